"""Kinds of heads, by their phases."""

from ropepp.eval.analyze.heads import head_pairs, kinds_of
from ropepp.model.positions import HeadSplit, PartialDoubling, Phases, RoPEppEC


def test_names_of_kinds() -> None:
    layout = Phases(phases=(0.0, 45.0, 270.0)).layout(2, 1)
    assert kinds_of(layout) == {"real": [0, 3], "phase 45": [1, 4], "imaginary": [2, 5]}
    doubled = PartialDoubling().layout(4, 2)
    assert kinds_of(doubled) == {"real": [0, 2, 3, 5], "imaginary": [1, 4]}
    assert kinds_of(HeadSplit().layout(4, 2)) == {"real": [0, 1], "imaginary": [2, 3]}


def test_pairs_share_a_projection() -> None:
    layouts = [RoPEppEC().layout(4, 2), PartialDoubling().layout(4, 2)]
    for layout in layouts:
        for real, imaginary in head_pairs(layout):
            assert layout.heads[real].projection == layout.heads[imaginary].projection
            assert (layout.heads[real].phase, layout.heads[imaginary].phase) == (0, -90)
    assert [len(head_pairs(layout)) for layout in layouts] == [4, 2]
    assert head_pairs(HeadSplit().layout(4, 2)) == []
