"""docs/trust.md: what holds a promise exists, and its exit codes are those of the code."""

import ast
import re
import signal
from pathlib import Path

import pytest

import faults
from faults_parts import CODES
from helpers.golden_data import REPOSITORY
from ropepp.cli import COMMANDS

PAGE = (REPOSITORY / "docs" / "trust.md").read_text()
SOURCE = REPOSITORY / "src" / "ropepp"


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def table_of_codes() -> set[int]:
    lines = section("Exit codes").splitlines()
    return {int(found[1]) for line in lines if (found := re.match(r"\| (\d+) \|", line))}


def codes_of(file: Path) -> set[int]:
    """Numbers with which a file ends the process: of ``sys.exit``, ``Stopped`` and ``main``."""
    tree, found = ast.parse(file.read_text()), set[int]()
    for node in ast.walk(tree):
        values: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "SystemExit"):
            values = node.args
        elif isinstance(node, ast.ClassDef) and file.name == "errors.py":
            values = [one.value for one in node.body if isinstance(one, ast.Assign)]
        elif isinstance(node, ast.FunctionDef) and node.name == "main" and file.name == "cli.py":
            returns = [one for one in ast.walk(node) if isinstance(one, ast.Return) and one.value]
            values = [one.value for one in returns if one.value is not None]
        for value in values:
            text = ast.unparse(value)
            if re.fullmatch(r"[\d +]+|128 \+ signal\.SIG\w+", text):
                found.add(int(eval(text, {"signal": signal})))
    return found


def test_exit_codes() -> None:
    told = table_of_codes()
    made = set[int]().union(*(codes_of(file) for file in SOURCE.rglob("*.py")))
    assert made == told == {*CODES, 1}


def test_what_holds_a_promise_exists() -> None:
    tests = {name.rstrip(".,)") for name in re.findall(r"tests/[\w/]+\.py(?:::\w+)?", PAGE)}
    assert len(tests) > 20
    for test in sorted(tests):
        file, _, function = test.partition("::")
        assert (REPOSITORY / file).is_file(), test
        assert f"def {function}" in (REPOSITORY / file).read_text(), test
    rows = [fault.key for fault in faults.all_faults()]
    named = re.findall(r"`((?:kills|damage|signals|disks|hostile|two): [^`]+)`", PAGE)
    assert len(named) > 30
    for name in named:
        assert any(row.startswith(name) for row in rows), name


def test_every_promise_is_held_by_something() -> None:
    for title in ("By command", "Files of others", "Promises of other pages"):
        rows = [line for line in section(title).splitlines() if line.startswith("|")][2:]
        assert rows
        for row in rows:
            last = row.rstrip("| ").split(" | ")[-1]
            assert "tests/" in last or re.search(r"`\w+: ", last), row


def test_every_command_has_a_promise() -> None:
    told = " ".join(
        line.split("|")[1] for line in section("By command").splitlines()[5:] if "|" in line
    )
    for command in COMMANDS:
        assert re.search(rf"`{command}\b", told), command


@pytest.mark.parametrize("page", ["cluster", "sweeps", "data"])
def test_no_code_is_told_elsewhere_that_is_not_here(page: str) -> None:
    text = (REPOSITORY / "docs" / f"{page}.md").read_text()
    told = [int(code) for code in re.findall(r"(?:exit code|ends? with) (\d+)", text)]
    assert {*told} <= table_of_codes()
