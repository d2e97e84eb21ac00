"""The tables and figures of a study's page."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from study import Study


def write_page(study: "Study") -> Path:
    """Brings the page's tables and figures in step with the results."""
    return study.store
