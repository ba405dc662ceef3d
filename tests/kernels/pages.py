"""A paged KV cache with known contents, for tests of attention over it."""

import torch
from torch import Tensor

from octavo.kernels import PLAIN, AttentionBatch, AttentionKind


class Pages:
    """A cache whose every row outside the sequences is NaN, and the dense tensors it holds.

    With a window, blocks that no query of a sequence sees are NaN, too, and not in its table.
    """

    def __init__(
        self, lengths, heads, kv_heads, dim, dtype, block_size=16, device="cpu", kind=PLAIN
    ):
        self.kind = kind
        counts = [-(-context // block_size) for _, context in lengths]
        num_blocks = sum(counts) + 3
        shape = (2, num_blocks, kv_heads, block_size, dim)
        self.kv_cache = torch.full(shape, float("nan"), dtype=dtype, device=device)
        # Rows of the table are wider than any sequence needs; what is beyond must not be read.
        tables = torch.full((len(lengths), max(counts) + 2), 2**30, dtype=torch.int32)
        blocks = torch.randperm(num_blocks).int().split([*counts, 3])
        self.dense: list[Tensor] = []  # each [2, context, Hkv, D]
        for b, (num_queries, context) in enumerate(lengths):
            dense = torch.randn(2, context, kv_heads, dim, device=device).to(dtype)
            self.dense.append(dense)
            tables[b, : counts[b]] = blocks[b]
            whole = dense.new_full((2, counts[b] * block_size, kv_heads, dim), float("nan"))
            whole[:, :context] = dense
            whole = whole.unflatten(1, (-1, block_size)).transpose(2, 3).contiguous()
            if kind.window is not None:
                unseen = max(0, context - num_queries - kind.window + 1) // block_size
                tables[b, :unseen] = 2**30
                whole[:, :unseen] = float("nan")
            self.kv_cache[:, blocks[b].to(device)] = whole
        queries = [count for count, _ in lengths]
        contexts = [context for _, context in lengths]
        starts = torch.tensor([0, *queries]).cumsum(0).int().to(device)
        self.batch = AttentionBatch(
            starts,
            torch.tensor(contexts).int().to(device),
            tables.to(device),
            max(queries),
            max(contexts),
        )
        qkv = torch.randn(sum(queries), (heads + 2 * kv_heads) * dim, device=device).to(dtype)
        self.query = qkv[:, : heads * dim].view(-1, heads, dim)

    def expected(self, scale: float) -> Tensor:
        """By torch's own attention in fp64, rounded to fp32, one sequence at a time.

        It has no softcap: then by the formula, whose softmax is torch's.
        """
        out = []
        starts = self.batch.query_starts.tolist()
        for b, dense in enumerate(self.dense):
            query = self.query[starts[b] : starts[b + 1]].double().transpose(0, 1)
            keys, values = dense.double().transpose(1, 2)
            group = query.shape[0] // keys.shape[0]
            keys, values = (t.repeat_interleave(group, dim=0) for t in (keys, values))
            rows, context = query.shape[1], keys.shape[1]
            mask = visible(self.kind, rows, context).to(query.device)
            if self.kind.softcap is not None:
                scores = query @ keys.transpose(1, 2) * scale
                scores = self.kind.softcap * torch.tanh(scores / self.kind.softcap)
                mixed = scores.where(mask, -torch.inf).softmax(-1) @ values
            else:
                mixed = torch.nn.functional.scaled_dot_product_attention(
                    query, keys, values, attn_mask=mask, scale=scale
                )
            out.append(mixed.transpose(0, 1).float())
        return torch.cat(out)


def visible(kind: AttentionKind, rows: int, context: int) -> Tensor:
    """[rows, context]: what each of the last `rows` tokens of a context sees."""
    if not kind.causal:
        return torch.ones(rows, context, dtype=torch.bool)
    distance = torch.arange(context - rows, context)[:, None] - torch.arange(context)
    return (distance >= 0) & (distance < (kind.window or context))
