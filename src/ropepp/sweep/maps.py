"""Where the heads of a sweep's runs look, as files in the runs' folders."""

from ropepp.errors import InputError
from ropepp.eval.analyze.attention_maps import attention_maps, draw
from ropepp.eval.analyze.rows import read_rows
from ropepp.files import write_json
from ropepp.interop.saved import open_model
from ropepp.runs.checkpoints import newest_complete
from ropepp.runs.records import Run

IMAGE, FIGURES = "attention.png", "attention.json"


def write_maps(run: Run, rows: int = 8, most_tokens: int = 16384) -> str | None:
    """Writes the maps of a run's newest checkpoint, on text of its own validation split, into its
    folder: ``attention.png`` and, with the measures, ``attention.json``. Reads one row at least,
    and not more than ``most_tokens``. Returns why there are none, or None."""
    checkpoint = newest_complete(run.directory / "checkpoints")
    if checkpoint is None:
        return "it has no complete checkpoint"
    if not (run.directory / "config.yaml").is_file():
        return "config.yaml is missing"
    try:
        saved = open_model(checkpoint)
        length = saved.config["data"]["init_args"]["sequence_length"]
        text = read_rows(saved, max(1, min(rows, most_tokens // length)))
    except InputError as error:
        return str(error)
    maps = attention_maps(saved.model, text.inputs)
    draw(maps, run.directory / IMAGE)
    content = {
        "checkpoint": checkpoint.name,
        "rows": len(maps.by_head),
        "length": maps.length,
        "heads": maps.heads,
        "measures": maps.measures,
        "uniform": maps.uniform(),
    }
    write_json(run.directory / FIGURES, content)
    return None
