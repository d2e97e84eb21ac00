"""Settings of fit as plain dictionaries."""

from pathlib import Path

from ropepp.runs.settings import differences, flatten, label, overlay, read_yaml


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
