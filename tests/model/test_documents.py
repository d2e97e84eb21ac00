"""Boundaries of documents, as loaders give them and as ids do."""

import pickle

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch.utils.data import default_convert

from ropepp.errors import InputError
from ropepp.model import ModelConfig, Transformer
from ropepp.model.cache import KVCache
from ropepp.model.documents import Documents, Recent
from ropepp.model.positions import RoPEppEC

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=32, ffn_size=48, num_layers=2, num_heads=4, num_kv_heads=2
)
IDS = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 1, 1, 1, 1, 1]])
BOUNDS = torch.tensor([0, 3, 5, 6, 7, 12], dtype=torch.int32)


def test_from_ids() -> None:
    found = Documents.from_ids(IDS)
    assert found is not None
    assert torch.equal(found.boundaries, BOUNDS)
    assert found.boundaries.dtype == torch.int32
    assert found.lengths == (3, 2, 1, 1, 5)
    assert Documents.from_ids(torch.tensor([[3, 1, 3, 1], [0, 0, 2, 2]])) is None


def test_they_move_and_the_hosts_boundaries_stay() -> None:
    moved = Documents(BOUNDS).to("meta")
    assert moved.boundaries.device.type == "meta"
    assert moved.lengths == (3, 2, 1, 1, 5)
    batch = move_data_to_device({"documents": [Documents(BOUNDS)]}, torch.device("meta"))
    assert batch["documents"][0].boundaries.device.type == "meta"
    assert isinstance(default_convert({"x": Documents(BOUNDS)})["x"], Documents)
    copy = pickle.loads(pickle.dumps(Documents(BOUNDS)))
    assert torch.equal(copy.host, BOUNDS)


@pytest.mark.gpu
def test_pinned_ones_move_without_a_wait() -> None:
    pinned = Documents(BOUNDS).pin_memory()
    assert pinned.host.is_pinned()
    assert torch.equal(pinned.to("cuda").boundaries.cpu(), BOUNDS)


def test_a_model_takes_them_for_ids() -> None:
    model = Transformer(CONFIG, RoPEppEC())
    tokens, targets = torch.randint(50, (2, 2, 6)).unbind()
    given = Documents(BOUNDS)
    assert torch.equal(model(tokens, document_ids=given), model(tokens, document_ids=IDS))
    for method in (model.loss, model.evaluate):
        by_ids, by_bounds = (method(tokens, targets, None, which) for which in (IDS, given))
        for want, got in zip(by_ids, by_bounds, strict=True):
            assert torch.equal(got, want)
    assert not torch.equal(model(tokens), model(tokens, document_ids=given))


def test_documents_that_do_not_fit() -> None:
    model, tokens = Transformer(CONFIG, RoPEppEC()), torch.zeros(2, 6, dtype=torch.int64)
    # Too few tokens, and a document across the end of a row.
    for bounds in ([0, 4, 9], [0, 3, 12], [0, 4, 8, 12]):
        with pytest.raises(InputError, match="not those of 2 rows of 6 tokens"):
            model(tokens, document_ids=Documents(torch.tensor(bounds)))
    with pytest.raises(InputError, match="need ids of documents"):
        model(tokens, document_ids=Documents(BOUNDS), cache=KVCache(2))
    with pytest.raises(InputError, match="begin at 0 and never fall"):
        model(tokens, document_ids=Documents(torch.tensor([0, 4, 3, 12])))


def test_recent_results_are_found_by_identity_and_not_after_a_change() -> None:
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    assert Documents(bounds).lengths is Documents(bounds).lengths
    assert Documents(bounds).lengths == (3, 4)
    bounds[1] = 5
    assert Documents(bounds).lengths == (5, 2)
    recent: Recent[int] = Recent(2)
    made = [recent.get((n,), lambda n=n: n) for n in (1, 2, 3)]  # type: ignore[misc]
    assert made == [1, 2, 3]
    assert recent.get((3,), lambda: 0) == 3
    assert recent.get((1,), lambda: 0) == 0
