"""Device memory that is given up for a while, its contents kept on the host. Knows no models.

It is done in place: a tensor, its views and whoever holds them stay what they are, and only lie
somewhere else afterwards. So no layer, and no format of weights, has to know of it.
"""

import gc
import types
from collections.abc import Iterable

import torch
from torch import Tensor, UntypedStorage

PIECE_BYTES = 2**26  # pinned memory comes in powers of two: pieces of one size waste little

# Not followed in the search for tensors: their globals reach the whole process.
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def reachable_storages(root: object) -> list[UntypedStorage]:
    """The memory of all tensors that `root` leads to, each piece once. What is empty is left out.

    Nobody has to declare what it holds, so no layer can forget to.
    """
    seen: set[int] = set()
    storages: dict[int, UntypedStorage] = {}
    waiting = [root]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, _CODE):
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            storage = found.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage
        else:
            waiting += gc.get_referents(found)
    return list(storages.values())


class HostCopies:
    """What was in some memory on a device, which is free once this is made.

    After `restore` the copies are still there: `release` gives the device's memory up once more.
    """

    def __init__(self, storages: Iterable[UntypedStorage]):
        self._copies = [(storage, _to_host(storage)) for storage in storages]
        self.num_bytes = sum(storage.nbytes() for storage, _ in self._copies)
        self.release()

    def release(self) -> None:
        """Give the device's memory up. The tensors in it must not be used then."""
        for storage, _ in self._copies:
            storage.resize_(0)

    def restore(self) -> None:
        """Take memory on the device again, at whatever address, with the contents from before."""
        for storage, pieces in self._copies:
            storage.resize_(sum(len(piece) for piece in pieces))
            for place, piece in zip(_pieces_of(storage), pieces, strict=True):
                place.copy_(piece)


def _to_host(storage: UntypedStorage) -> list[Tensor]:
    copies = []
    for piece in _pieces_of(storage):
        copies.append(torch.empty(len(piece), dtype=torch.uint8, pin_memory=piece.is_cuda))
        copies[-1].copy_(piece)
    return copies


def _pieces_of(storage: UntypedStorage) -> tuple[Tensor, ...]:
    """All bytes of a storage, [at most PIECE_BYTES] uint8 each."""
    content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return torch.split(content, PIECE_BYTES)
