"""The files of bAbI and of BABILong, where given."""

from pathlib import Path
from zipfile import BadZipFile, ZipFile

from ropepp.data.text.documents import BOM, decode
from ropepp.data.text.readers import read_text
from ropepp.errors import InputError
from ropepp.eval.babilong.stories import Story
from ropepp.records import read_json

FOLDER = "tasks_1-20_v1-2"  # and .zip
PART = "en-10k"


def read_stories(path: Path, task: str) -> list[Story]:
    """The test stories of a task ("qa1", ...), one for each question, in `tasks_1-20_v1-2`,
    unpacked or as a .zip file; an `InputError` if its file is missing or has another form."""
    name, text = _text(path, task)
    stories: list[Story] = []
    facts: list[str] = []
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        place, _, rest = line.strip().partition(" ")
        if not place.isdecimal() or not rest:
            raise InputError(f"{name}, line {number}: {line[:40]!r} is not 'number text'")
        if place == "1":
            facts = []
        if "\t" in rest:
            question, answer = rest.split("\t")[:2]
            stories.append(Story(tuple(facts), question.strip(), answer.strip()))
        else:
            facts.append(rest.strip())
    if not stories:
        raise InputError(f"{name} has no questions")
    return stories


def read_split(folder: Path, length: int) -> list[dict[str, str]]:
    """Samples as BABILong has published them, `4k.json` for a length of 4096, each with "input",
    "question" and "target"; an `InputError` if there is no such file, or it has another form."""
    path = folder / f"{length // 1024}k.json"
    if length % 1024 or not path.is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*k.json"))) or "none"
        raise InputError(f"length is {length}; {folder} has other files alone: {there}")
    content = read_json(path)
    keys = ("input", "question", "target")
    whole = isinstance(content, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys)
        for row in content
    )
    if not whole:
        raise InputError(f"{path} is no list of objects with {', '.join(keys)}")
    return list(content)


def _text(path: Path, task: str) -> tuple[str, str]:
    pattern = f"{PART}/{task}_*_test.txt"
    if path.is_dir():
        found = sorted(path.glob(pattern))
        if found:
            return str(found[0]), read_text(found[0])
    else:
        try:
            with ZipFile(path) as archive:
                names = [n for n in archive.namelist() if Path(n).match(f"*/{pattern}")]
                if names:
                    place = f"{path}/{names[0]}"
                    return place, decode(archive.read(names[0]), place).removeprefix(BOM)
        except BadZipFile as error:
            raise InputError(f"{path} is no zip file") from error
    raise InputError(f"{path} has no file {pattern}")
