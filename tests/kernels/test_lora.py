"""LoRA's products: the reference against the formula, Triton's against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels import LORA, Case, LoRAShape, reference_only

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # Triton's interpreter has no bf16 dot
SHAPES = {
    "one part": LoRAShape(2, 8, (70,), 50),
    "queries, keys, values": LoRAShape(3, 16, (130, 40, 40), 96),
    "gate and up": LoRAShape(2, 5, (129, 129), 33),
    "deep": LoRAShape(2, 4, (20,), 1100),
    "a large rank": LoRAShape(2, 100, (32, 16, 16), 64),
}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class Adapters:
    """Random ones, by slot, and what they add in fp32."""

    def __init__(self, shape: LoRAShape, dtype: torch.dtype):
        self.shape, self.dtype = shape, dtype
        num_parts, rank = len(shape.parts), shape.rank
        self.pairs = [
            (
                torch.randn(num_parts, rank, shape.in_features) * shape.in_features**-0.5,
                torch.randn(shape.out_features, rank) * rank**-0.5,
            )
            for _ in range(shape.num_slots)
        ]

    def expected(self, y: Tensor, x: Tensor, adapters: Tensor) -> Tensor:
        """y + B A x of each row, in fp32."""
        y, x = y.float().clone(), x.float()
        for row, slot in enumerate(adapters.tolist()):
            if slot >= 0:
                a, b = (t.to(x.device, self.dtype).float() for t in self.pairs[slot])
                parts = b.split(self.shape.parts)
                y[row] += torch.cat([p @ (one @ x[row]) for one, p in zip(a, parts, strict=True)])
        return y

    def added(self, lora, y: Tensor, x: Tensor, adapters: Tensor, **sizes: int) -> Tensor:
        case = Case(y.device.type, self.dtype, sizes)
        slots = lora.allocate(self.shape, case)
        for slot, (a, b) in enumerate(self.pairs):
            lora.place(slots, slot, a, b)
        y = y.clone()
        lora.add(y, x, slots, lora.group(adapters, self.shape.num_slots))
        return y


def inputs(shape: LoRAShape, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.randn(num_tokens, shape.out_features).to(DEVICE, dtype)
    x = torch.randn(num_tokens, shape.in_features + 7)[:, 3:-4].to(DEVICE, dtype)
    adapters = torch.randint(-1, shape.num_slots, (num_tokens,), dtype=torch.int32, device=DEVICE)
    return y, x, adapters


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_the_reference_adds_each_tokens_own(shape, implementation, dtype):
    adapters = Adapters(shape, dtype)
    y, x, of_tokens = (t.cpu() for t in inputs(shape, 23, dtype))
    expected = adapters.expected(y, x, of_tokens)
    if implementation == "reference":
        with reference_only():
            ours = adapters.added(LORA.reference, y, x, of_tokens)
    else:
        ours = adapters.added(LORA.reference, y, x, of_tokens)
    torch.testing.assert_close(ours.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(ours[of_tokens < 0], y[of_tokens < 0])


def test_places_are_checked():
    shape = SHAPES["one part"]
    slots = LORA.reference.allocate(shape, Case("cpu", torch.float32))
    with pytest.raises(ValueError, match="A and B are"):
        LORA.reference.place(slots, 0, torch.zeros(1, 9, 50), torch.zeros(70, 8))


class TestTriton:
    """In its interpreter, or on a GPU."""

    @pytest.fixture
    def lora(self):
        pytest.importorskip("triton")
        from octavo.kernels.triton_lora import TRITON_LORA

        return TRITON_LORA

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_it_is_the_reference(self, lora, poisoned, shape):
        for num_tokens, dtype in ((1, torch.float32), (70, torch.float32), (33, HALF)):
            adapters = Adapters(shape, dtype)
            y, x, of_tokens = inputs(shape, num_tokens, dtype)
            expected = adapters.expected(y, x, of_tokens)
            ours = adapters.added(lora, y, x, of_tokens)
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=tolerance)
            assert torch.equal(ours[of_tokens < 0], y[of_tokens < 0])

    @pytest.mark.parametrize("slot", [-1, 1])
    def test_all_tokens_may_have_the_same_or_none(self, lora, poisoned, slot):
        adapters = Adapters(SHAPES["one part"], torch.float32)
        y, x, of_tokens = inputs(adapters.shape, 40, torch.float32)
        of_tokens.fill_(slot)
        ours = adapters.added(lora, y, x, of_tokens)
        torch.testing.assert_close(ours, adapters.expected(y, x, of_tokens), rtol=2e-5, atol=2e-5)

    @pytest.mark.parametrize("num_tokens", [1, 31, 32, 65, 200])
    @pytest.mark.parametrize("num_slots", [1, 4, 90])
    def test_tiles_hold_every_token_once(self, lora, num_tokens, num_slots):
        adapters = torch.randint(-1, num_slots, (num_tokens,), dtype=torch.int32, device=DEVICE)
        groups = lora.group(adapters, num_slots)
        order, found = groups.order.tolist(), []
        assert sorted(order) == list(range(num_tokens))
        for slot, start, end in groups.table.t().tolist():
            assert end - start <= 32
            tokens = order[start:end] if end > start else []
            assert [adapters[token].item() for token in tokens] == [slot] * len(tokens)
            found += tokens
        assert sorted(found) == [t for t in range(num_tokens) if adapters[t] >= 0]

    def test_bits_do_not_depend_on_the_batch_where_that_is_promised(self, lora):
        shape = SHAPES["deep"]
        adapters = Adapters(shape, torch.float32)
        y, x, of_tokens = inputs(shape, 70, torch.float32)
        of_tokens[5] = 1
        together = adapters.added(lora, y, x, of_tokens, batch_invariant=1)
        alone = adapters.added(lora, y[5:6], x[5:6], of_tokens[5:6], batch_invariant=1)
        assert torch.equal(alone, together[5:6])

    def test_what_it_would_misread_is_refused(self, lora):
        shape = SHAPES["one part"]
        adapters = Adapters(shape, torch.float32)
        y, x, of_tokens = inputs(shape, 4, torch.float32)
        wrong = [(y, x[:, 1:]), (y[:3], x), (y.half(), x), (y.t().contiguous().t(), x)]
        for bad_y, bad_x in wrong:
            with pytest.raises(ValueError, match="lora: "):
                adapters.added(lora, bad_y, bad_x, of_tokens)
        with pytest.raises(ValueError, match="at most 3 parts"):
            lora.allocate(LoRAShape(1, 4, (8, 8, 8, 8), 16), Case(DEVICE, torch.float32))
