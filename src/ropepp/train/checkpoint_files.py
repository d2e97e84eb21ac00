"""How checkpoints of one file are written and read, and which one a run goes on from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import CheckpointIO

from ropepp.runs.archives import write_archive
from ropepp.runs.checkpoints import first_whole, read_checkpoint

Content = dict[str, Any]


class CheckpointFiles(CheckpointIO):
    """Writes beside the target and onto the disk, executes nothing that it reads, finds damage.
    With ``fall_back`` an older checkpoint serves then; ``restoring`` is being put in place."""

    def __init__(self, fall_back: bool = False) -> None:
        self.fall_back = fall_back
        self.restoring: Path | None = None

    def save_checkpoint(self, checkpoint: Content, path: Any, storage_options: Any = None) -> None:
        write_archive(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> Content:
        """See `ropepp.runs.checkpoints.read_checkpoint`."""
        used = ("state_dict", "optimizer_states")
        return self.load(Path(path), lambda one: read_checkpoint(one, *used, mapped=False))

    def load(self, path: Path, read: Callable[[Path], Content]) -> Content:
        """What ``read`` makes of a checkpoint or, if it is damaged, of an older one."""

        def note(one: Path) -> Content:
            self.restoring = one
            return read(one)

        return first_whole(path, note) if self.fall_back else note(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
