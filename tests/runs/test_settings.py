"""Settings of fit as plain dictionaries."""

from pathlib import Path

import pytest

from ropepp.errors import InputError
from ropepp.runs.settings import (
    check_references,
    differences,
    flatten,
    label,
    overlay,
    read_settings,
    read_yaml,
)


def test_settings(tmp_path: Path) -> None:
    nested = {"model": {"a": {"class_path": "x.A", "init_args": {"lr": 1, "b": {"c": [2]}}}}}
    assert flatten(nested) == {"model.a": "A", "model.a.lr": 1, "model.a.b.c": [2]}
    changed = overlay([nested, {"model.a": {"class_path": "B"}}, {"model.a.init_args.z": 3}])
    assert changed == {"model.a": "B", "model.a.z": 3}
    assert label({"class_path": "x.A", "init_args": {"lr": 0.5}}) == "A_0.5"
    assert label([0.0, -45.5, "a/b"]) == "0_-45.5_a_b"
    assert list(differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}], "c": 0})) == [
        "a[1].b was 2 and is 3",
        "c was null and is 0",
    ]
    (tmp_path / "a.yaml").write_text("a: 1e-3\nb: 1.5\nc: x1e5\nd: 12e03\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": 1e-3, "b": 1.5, "c": "x1e5", "d": 12e3}


LAUGHS = "a: &a0 [x, x, x]\n" + "".join(
    f"b{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 30)
)
MERGES = "a: &a0 {x: 1}\n" + "".join(
    f"b{n}: &a{n} {{<<: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 40)
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LAUGHS, "more than 10,000 values"),
        (MERGES, "more than 10,000 values"),
        ("a: &a " + "x" * 10_000 + "\nb: [" + "*a, " * 300 + "]", "more than 10,000 values"),
        ("a: [" + "1, " * 30_000 + "]", "more than 10,000 values"),
        ("a: &a [1, *a]", "*a stands within what it means"),
        ("a: " + "[" * 60 + "]" * 60, "more than 50 levels"),
        ("a: " + "[" * 100_000, "nesting"),
        ("- " * 500, "more than 50 levels"),
        ("a: " + "x" * 2**20, "longer than 1,048,576 bytes"),
        ("a: 1\na: 2", "duplicate key a"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: 1" + "0" * 5000, "limit"),
        ("3", "Invalid"),
    ],
)  # fmt: skip
def test_yaml_out_of_bounds(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(content)
    with pytest.raises(InputError) as error:
        read_yaml(file)
    assert words in str(error.value)
    assert str(error.value).startswith(str(file))
    file.write_bytes(b"# caf\xe9\na: 1\n")
    with pytest.raises(InputError, match=r"a.yaml: 'utf-8' codec"):
        read_yaml(file)


def test_aliases_within_bounds(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}\n")
    assert read_yaml(file) == {"a": {"x": 1}, "b": [{"x": 1}] * 2, "c": {"x": 1, "y": 2}}


def test_files_that_name_each_other(tmp_path: Path) -> None:
    (tmp_path / "self.yaml").write_text("model: self.yaml\n")
    with pytest.raises(InputError, match=r"self.yaml names itself: self.yaml -> self.yaml"):
        read_settings(tmp_path / "self.yaml")
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text("x: [sub/b.yaml]\n")
    (tmp_path / "sub/b.yaml").write_text("y: ../a.yaml\n")
    with pytest.raises(InputError, match=r"names itself: a.yaml -> b.yaml -> a.yaml"):
        read_settings(tmp_path / "a.yaml")
    for number in range(30):
        text = f"a: f{number + 1}.yaml\nb: f{number + 1}.yaml\n"
        (tmp_path / f"f{number}.yaml").write_text(text)
    (tmp_path / "f30.yaml").write_text("x: 1\n")
    with pytest.raises(InputError, match=r"f0.yaml has more than 10,000 values"):
        read_settings(tmp_path / "f0.yaml")
    (tmp_path / "twice.yaml").write_text("a: f30.yaml\nb: f30.yaml\n")
    assert read_settings(tmp_path / "twice.yaml") == {"a": {"x": 1}, "b": {"x": 1}}


def test_references() -> None:
    for content in (
        {"a": "${a}"},
        {"a": {"b": "${..a}"}},
        {"a": "${b}", "b": ["${.1}", "x${a}"]},
        {"a": "${b}${b}", "b": "${c}${c}", "c": "x"},
        {"a": "${b}", "b": [1]},
        {"a": "${b}", "b": "x" * 2001},
        {"a": "${b}" * 1000, "b": 1},
        {"a": "${oc.create:[1]}"},
        {"a": "${b.${c}}"},
    ):
        words = r"a.yaml: [ab][.\w]* is '.*'; allowed: \${KEY} of a plain value, \${oc.env:NAME}"
        with pytest.raises(InputError, match=words):
            check_references(content, "a.yaml")
    fine = {"a": "${.b}/${b}", "b": 1, "c": [{"d": "${oc.env:HOME}"}], "e": "${no.such}"}
    check_references(fine | {"f": {"g": "${..c[1].d}", "h": "${.g.i}"}}, "a.yaml")
