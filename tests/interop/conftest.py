"""transformers without network, and with a place of its own for the code of folders."""

import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="ropepp-hf-"))
sys.path.append(str(Path(__file__).parents[1] / "data"))
