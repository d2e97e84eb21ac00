"""TensorBoard's event files that are written at once, not bit by bit."""

import os
import time
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from ropepp.files import disk_errors, write_synced

EVENTS = "events.out.tfevents."

Step = tuple[int, Any]  # a step and a Summary


def write_events(file: Path, summaries: Iterable[Step]) -> None:
    """Writes an event file, completely or not at all, or raises a `DiskError`; makes parents."""
    content, now = BytesIO(), time.time()
    writer = RecordWriter(content)
    writer.write(event_pb2.Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for step, summary in summaries:
        event = event_pb2.Event(wall_time=now, step=step, summary=summary)
        writer.write(event.SerializeToString())
    temporary = file.with_name(".events.tmp")  # a name that TensorBoard does not read
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_synced(temporary, content.getvalue(), file)
    os.replace(temporary, file)
