"""Tensors into slots: exact names, exact shapes, finite values."""

import pytest
import torch

from octavo.errors import CheckpointError
from octavo.layers import Slot
from octavo.weights import TensorStream, dummy_tensors, load_weights


class Table:
    """Two slots that remember what they were given."""

    def __init__(self, **shapes):
        self.loaded = {}
        shapes = shapes or {"a.weight": (2, 3), "b.weight": (3,)}
        self.slots = {name: Slot(shape, self._loader(name)) for name, shape in shapes.items()}

    def _loader(self, name):
        return lambda tensor: self.loaded.setdefault(name, tensor)


def tensors(**changes):
    named = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(3)} | changes
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def stream(named):
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    return TensorStream("some/file", shapes, lambda: iter(named.items()))


def test_every_slot_is_loaded_once():
    table = Table()
    load_weights(table.slots, stream(tensors()))
    assert set(table.loaded) == {"a.weight", "b.weight"}
    assert torch.equal(table.loaded["a.weight"], torch.ones(2, 3))


@pytest.mark.parametrize("wrap", [stream, lambda named: named.items()])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b.weight": None}, "missing tensors 'b.weight'"),
        ({"c.weight": torch.ones(1)}, "unexpected tensor.* 'c.weight'"),
        ({"b.weight": torch.ones(4)}, r"'b.weight' has shape \(4,\).*asks for \(3,\)"),
        ({"b.weight": torch.tensor([0, torch.nan, 1])}, "'b.weight' holds NaN or infinity"),
        ({"b.weight": torch.tensor([0, -torch.inf, 1])}, "'b.weight' holds NaN or infinity"),
    ],
)
def test_refusals_name_the_tensor(wrap, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load_weights(Table().slots, wrap(tensors(**changes)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_infinity_that_a_narrower_type_made(dtype):
    named = tensors(**{"b.weight": torch.tensor([0, 1e30, 1]).to(dtype)})
    if dtype is torch.float16:
        with pytest.raises(CheckpointError, match="infinity"):
            load_weights(Table().slots, stream(named))
    else:
        load_weights(Table().slots, stream(named))


def test_a_stream_is_checked_before_it_is_read():
    def explode():
        raise AssertionError("read")

    table = Table()
    for shapes in ({"a.weight": (2, 3)}, {"a.weight": (2, 3), "b.weight": (4,)}):
        with pytest.raises(CheckpointError, match="some/file"):
            load_weights(table.slots, TensorStream("some/file", shapes, explode))
    assert not table.loaded


def test_many_names_are_cut_short():
    slots = {f"layer.{i}": Slot((1,), print) for i in range(100)}
    with pytest.raises(CheckpointError, match="'layer.5' and 94 more"):
        load_weights(slots, [])


def test_the_same_tensor_twice():
    pair = ("a.weight", torch.ones(2, 3))
    with pytest.raises(CheckpointError, match="'a.weight' occurs twice"):
        load_weights(Table().slots, [pair, pair])


@pytest.mark.parametrize("wrap", [stream, lambda named: named.items()])
def test_what_old_and_tied_checkpoints_store_beside_is_ignored(wrap):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": torch.full((2, 2), torch.nan),
    }
    table = Table()
    load_weights(table.slots, wrap(tensors(**extra)))
    assert set(table.loaded) == {"a.weight", "b.weight"}


def test_untied_heads_are_needed():
    table = Table(**{"lm_head.weight": (2, 2)})
    with pytest.raises(CheckpointError, match="missing tensors 'lm_head.weight'"):
        load_weights(table.slots, [])
    load_weights(table.slots, {"lm_head.weight": torch.ones(2, 2)}.items())
    assert set(table.loaded) == {"lm_head.weight"}


def test_dummy_tensors():
    shapes = {"x.weight": (200, 100), "y.weight": (200, 100), "norm.weight": (5,), "x.bias": (5,)}
    table = Table(**shapes)
    first = dict(dummy_tensors(table.slots, dtype=torch.bfloat16))
    again = dict(dummy_tensors(table.slots, dtype=torch.bfloat16))
    other = dict(dummy_tensors(table.slots, dtype=torch.bfloat16, seed=1))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == shapes
    assert all(tensor.dtype == torch.bfloat16 for tensor in first.values())
    assert torch.equal(first["x.weight"], again["x.weight"])
    assert not torch.equal(first["x.weight"], other["x.weight"])
    assert not torch.equal(first["x.weight"], first["y.weight"])
    assert first["x.weight"].float().std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(first["norm.weight"], torch.ones(5, dtype=torch.bfloat16))
    assert not first["x.bias"].any()
    load_weights(table.slots, first.items())


def test_dummy_tensors_do_not_depend_on_their_neighbours():
    alone = dict(dummy_tensors(Table(**{"y": (4, 4)}).slots, dtype=torch.float32))
    both = dict(dummy_tensors(Table(**{"x": (9, 9), "y": (4, 4)}).slots, dtype=torch.float32))
    assert torch.equal(alone["y"], both["y"])
