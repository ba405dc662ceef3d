"""Where KV lives: each layer's blocks on the device, and the tiers below. Moves blocks when told.

Knows no requests and no keys' meaning: which content lies where is the allocator's to decide.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.core import Tier, Transfer
from octavo.errors import IntegrityError
from octavo.layers import KVSpec
from octavo.runner.disk_file import DiskFile


def allocate_kv_caches(
    specs: list[KVSpec], *, num_blocks: int, block_size: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """The KV storage of each layer, [parts, num_blocks, Hkv, block_size, D], uninitialised.

    There are two parts, keys and values, or one that holds both: see `KVSpec`.

    On a CPU the system backs a page when it is first written, so unused blocks cost no memory.
    """
    return [
        torch.empty(
            (spec.num_parts, num_blocks, spec.num_kv_heads, block_size, spec.head_dim),
            dtype=dtype,
            device=device,
        )
        for spec in specs
    ]


@dataclass(frozen=True, slots=True)
class _Group:
    """Transfers of one kind that do not depend on each other, so that one copy serves all."""

    kind: tuple[Tier, Tier]
    indices: list[int]  # into the plan's transfers
    sources: list[int]
    targets: list[int]


class KVStorage:
    """The KV blocks of all layers and tiers. Sole writer of host and disk; kernels write devices'.

    kv_caches: [parts, num_blocks, Hkv, block_size, D] for each layer that a block has room for, all
        of one dtype and device.
    With `places`, layers share caches, in blocks of their own: layer i has that of `places[i]`.
    A block below the device is one row with all layers' keys and values one after the other.
    Without layers (an encoder) there is nothing to keep, and no block anywhere.
    """

    def __init__(
        self,
        kv_caches: list[Tensor],
        *,
        places: Sequence[int] | None = None,
        num_host_blocks: int = 0,
        disk: DiskFile | None = None,
    ):
        self.kv_caches = kv_caches
        self.of_layers = kv_caches if places is None else [kv_caches[place] for place in places]
        self._sizes = [cache[:, 0].numel() for cache in kv_caches]
        self._host = torch.empty(
            (num_host_blocks, sum(self._sizes)),
            dtype=kv_caches[0].dtype if kv_caches else None,
            pin_memory=any(cache.is_cuda for cache in kv_caches),
        )
        self._disk = disk

    @property
    def padding_slot(self) -> int:
        """A slot of the last block: where tokens of nobody go, if there is one block too many."""
        if not self.kv_caches:
            return 0
        num_blocks, _, block_size = self.kv_caches[0].shape[1:4]
        return int((num_blocks - 1) * block_size)

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks, on the device and on the host."""
        return self.host_bytes + sum(cache.nbytes for cache in self.kv_caches)

    @property
    def host_bytes(self) -> int:
        """Bytes of the host tier."""
        return self._host.nbytes

    def transfer(self, transfers: tuple[Transfer, ...]) -> tuple[tuple[int, ...], float]:
        """Make these copies in order; return the indices of those that failed, and seconds.

        Only copies between device and host are timed and waited for; others need no waiting.
        """
        failed: list[int] = []
        seconds = 0.0
        for group in _grouped(transfers):
            start = time.perf_counter()
            match group.kind:
                case (Tier.DEVICE, Tier.DEVICE):
                    for cache in self.kv_caches:
                        cache[:, group.targets] = cache[:, group.sources]
                case (Tier.DEVICE, Tier.HOST):
                    self._host[group.targets] = self._gather(group.sources)
                case (Tier.HOST, Tier.DEVICE):
                    self._scatter(self._host[group.sources], group.targets)
                case (Tier.HOST, Tier.DISK):
                    failed += self._write(group, transfers)
                case (Tier.DISK, Tier.DEVICE):
                    failed += self._read(group)
                case _:
                    raise IntegrityError(f"no way leads from {group.kind[0]} to {group.kind[1]}")
            if set(group.kind) == {Tier.DEVICE, Tier.HOST}:
                if self.kv_caches[0].is_cuda:
                    torch.cuda.synchronize()
                seconds += time.perf_counter() - start
        return tuple(failed), seconds

    def measure_copy_s(self) -> float | None:
        """Seconds that moving a block between device and host takes; None where there is no host.

        Only before anything is in the blocks: their contents change.
        """
        count = min(8, len(self._host), *(cache.shape[1] for cache in self.kv_caches[:1]))
        if not count:
            return None
        out = [Transfer(Tier.DEVICE, i, Tier.HOST, i) for i in range(count)]
        back = [Transfer(Tier.HOST, i, Tier.DEVICE, i) for i in range(count)]
        both = (*out, *back)
        self.transfer(both)  # the first touch of new memory costs more
        return self.transfer(both)[1] / len(both)

    def _gather(self, blocks: list[int]) -> Tensor:
        """[n, values of a block] on the host, of n device blocks."""
        rows = [cache[:, blocks].transpose(0, 1).flatten(1) for cache in self.kv_caches]
        return torch.cat(rows, 1).cpu()

    def _scatter(self, rows: Tensor, blocks: list[int]) -> None:
        pieces = torch.split(rows.to(self.kv_caches[0].device), self._sizes, 1)
        for cache, piece in zip(self.kv_caches, pieces, strict=True):
            num_parts, _, num_heads, block_size, head_dim = cache.shape
            shaped = piece.reshape(-1, num_parts, num_heads, block_size, head_dim)
            cache[:, blocks] = shaped.transpose(0, 1)

    def _write(self, group: _Group, transfers: tuple[Transfer, ...]) -> Iterator[int]:
        disk = self._open_disk()
        for index, source, target in zip(group.indices, group.sources, group.targets, strict=True):
            if not disk.write(target, transfers[index].key, _bytes_of(self._host[source])):
                yield index

    def _read(self, group: _Group) -> Iterator[int]:
        disk = self._open_disk()
        rows = torch.empty((len(group.sources), self._host.shape[1]), dtype=self._host.dtype)
        for row, index, source in zip(rows, group.indices, group.sources, strict=True):
            if not disk.read(source, _bytes_of(row)):
                yield index
        self._scatter(rows, group.targets)

    def _open_disk(self) -> DiskFile:
        if self._disk is None:
            raise IntegrityError("a block is to go to disk, but there is none")
        return self._disk


def _grouped(transfers: tuple[Transfer, ...]) -> Iterator[_Group]:
    """Neighbours of one kind together, as long as none reads or overwrites what another wrote."""
    group: _Group | None = None
    for index, transfer in enumerate(transfers):
        kind = (transfer.source_tier, transfer.target_tier)
        if group is not None and (
            group.kind != kind
            or transfer.target in group.targets
            or (kind[0] is kind[1] and transfer.source in group.targets)
        ):
            yield group
            group = None
        if group is None:
            group = _Group(kind, [], [], [])
        group.indices.append(index)
        group.sources.append(transfer.source)
        group.targets.append(transfer.target)
    if group is not None:
        yield group


def _bytes_of(row: Tensor) -> memoryview:
    """The memory of a contiguous row of a host tensor."""
    return memoryview(row.view(torch.uint8).numpy().data)
