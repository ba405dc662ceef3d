"""KV memory below the device: blocks that lost their place there live on, on the host and on disk.

    device ──evicted──▶ host ──evicted──▶ disk        each bounded, least recently used goes first
       ▲                 │                 │
       └──── a request needs the content ──┘

The same host memory takes the blocks of preempted sequences (swap). Pure Python: it decides which
content lies where and writes down the copies; the runner makes them before the next step.
"""

from collections.abc import Iterable, Mapping

from octavo.core import Sequence, Swapped, Tier, Transfer
from octavo.errors import IntegrityError
from octavo.kvcache.allocator import PrefixAllocator
from octavo.kvcache.block_pool import BlockPool


class Store:
    """One tier below the device. Sole writer: its allocator.

    below: takes what is evicted from here; None lets it go.
    transfers: where copies are written down, in the order in which they must be made.
    """

    def __init__(
        self, tier: Tier, num_blocks: int, transfers: list[Transfer], below: "Store | None" = None
    ):
        self.tier = tier
        self.pool = BlockPool(num_blocks, on_evict=self._evict)
        self._transfers = transfers
        self._below = below

    def put(self, key: bytes, source_tier: Tier, source: int) -> None:
        """Keep the content of a block that is about to be used for something else."""
        block_id = self.pool.find(key)
        if block_id is not None:
            self._touch(block_id)
        elif self.pool.num_free:
            [block_id] = self.pool.take(1)
            self.pool.name(block_id, key)
            self.pool.give_back([block_id])
            self._transfers.append(Transfer(source_tier, source, self.tier, block_id, key))

    def hold(self, key: bytes | None, source: int) -> int:
        """Keep a device block's content until it is given back; return its place here."""
        block_id = None if key is None else self.pool.find(key)
        if block_id is not None:
            self.pool.share(block_id)
            return block_id
        [block_id] = self.pool.take(1)
        if key is not None:
            self.pool.name(block_id, key)
        self._transfers.append(Transfer(Tier.DEVICE, source, self.tier, block_id, key or b""))
        return block_id

    def restore(self, keys: Mapping[int, bytes]) -> None:
        """What an earlier life of this tier left behind: block -> key, oldest first."""
        blocks = self.pool.take(self.pool.num_blocks)
        for block_id, key in keys.items():
            self.pool.name(block_id, key)
        self.pool.give_back([b for b in blocks if b not in keys])
        self.pool.give_back(keys)

    def _touch(self, block_id: int) -> None:
        self.pool.share(block_id)
        self.pool.give_back([block_id])

    def _evict(self, block_id: int, key: bytes) -> None:
        if self._below is not None:
            self._below.put(key, self.tier, block_id)


class TieredAllocator(PrefixAllocator):
    """Prefix caching whose evicted blocks go to the host and on to disk, and come back on a hit.

    num_host_blocks, num_disk_blocks: how many blocks each tier holds at most.
    disk_keys: what the disk holds from an earlier run: block -> key, least recently written first.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        *,
        num_host_blocks: int,
        num_disk_blocks: int = 0,
        disk_keys: Mapping[int, bytes] | None = None,
    ):
        super().__init__(num_blocks, block_size)
        disk = Store(Tier.DISK, num_disk_blocks, self._transfers)
        disk.restore(disk_keys or {})
        self._host = Store(Tier.HOST, num_host_blocks, self._transfers, disk)
        self._stores = {Tier.HOST: self._host, Tier.DISK: disk}
        self._pool = BlockPool(
            num_blocks, on_evict=lambda block, key: self._host.put(key, Tier.DEVICE, block)
        )
        # What `start` found below the device, held until `extend` loads it: (tier, block) each.
        self._to_load: dict[str, list[tuple[Tier, int]]] = {}
        self._swapped: dict[str, Sequence] = {}

    def start(self, sequence: Sequence) -> int:
        num_tokens = super().start(sequence)
        if num_tokens % self.block_size:
            return num_tokens  # forked in the middle of a block: nothing goes on from there
        first = len(sequence.block_ids)
        swapped = sequence.swapped
        if swapped is not None and swapped.num_tokens > num_tokens:
            found = [(Tier.HOST, block_id) for block_id in swapped.host_block_ids[first:]]
            num_tokens = swapped.num_tokens
        else:
            found = self._find_below(sequence, first)
            num_tokens += len(found) * self.block_size
        for tier, block_id in found:
            self._stores[tier].pool.share(block_id)
        if found:
            self._to_load[sequence.id] = found
        return num_tokens

    def stop(self, sequence: Sequence) -> None:
        super().stop(sequence)
        self._release(self._to_load.pop(sequence.id, []))

    def refork(self, sequence: Sequence, parent_block_ids: list[int]) -> bool:
        self._forget_swapped(sequence)
        return super().refork(sequence, parent_block_ids)

    def extend(self, sequence: Sequence, num_tokens: int) -> int:
        first = super().extend(sequence, num_tokens)
        if found := self._to_load.pop(sequence.id, None):
            for (tier, source), target in zip(found, sequence.block_ids[first:], strict=False):
                self._transfers.append(Transfer(tier, source, Tier.DEVICE, target))
            self._release(found)
        self._forget_swapped(sequence)
        return first

    def swap_out(self, sequence: Sequence) -> bool:
        """Copy what was computed to the host. Nothing happens where there is no room for it."""
        num_known = len(sequence.token_ids) + sequence.num_pending_tokens
        num_tokens = min(sequence.num_computed_tokens, num_known)  # drafts may have been wrong
        table = sequence.block_ids[: -(-num_tokens // self.block_size)]
        if not table or len(table) > self._host.pool.num_free:
            return False
        places = [self._host.hold(self._pool.key_of(block_id), block_id) for block_id in table]
        sequence.swapped = Swapped(places, num_tokens)
        self._swapped[sequence.id] = sequence
        self.stop(sequence)
        return True

    def free(self, sequence: Sequence) -> None:
        super().free(sequence)
        self._forget_swapped(sequence)

    def lose(self, places: Iterable[tuple[Tier, int]]) -> None:
        """Forget these contents; who was swapped to one of them will be computed again."""
        lost: set[int] = set()
        for tier, block_id in places:
            if tier is not Tier.DEVICE:
                self._stores[tier].pool.forget(block_id)
            if tier is Tier.HOST:
                lost.add(block_id)
        for sequence in list(self._swapped.values()):
            swapped = sequence.swapped
            if swapped is not None and lost.intersection(swapped.host_block_ids):
                self._forget_swapped(sequence)

    def forget_all(self) -> None:
        super().forget_all()
        for store in self._stores.values():
            store.pool.forget_all()

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        live = list(live)
        super().check_integrity(live)
        swapped = {s.id: s for s in live if s.swapped is not None}
        if swapped != self._swapped:
            raise IntegrityError("the swapped sequences are not those that have host blocks")
        tables = [s.swapped.host_block_ids for s in live if s.swapped is not None]
        if self._to_load:
            raise IntegrityError(
                f"{sorted(self._to_load)} were started and neither run nor stopped"
            )
        self._host.pool.check_integrity(tables)
        self._stores[Tier.DISK].pool.check_integrity([])

    def _find_below(self, sequence: Sequence, first: int) -> list[tuple[Tier, int]]:
        found = []
        for index in range(first, self._num_findable(sequence)):
            key = self._key(sequence, index)
            places = ((tier, store.pool.find(key)) for tier, store in self._stores.items())
            place = next(((tier, block) for tier, block in places if block is not None), None)
            if place is None:
                break
            found.append(place)
        return found

    def _release(self, places: list[tuple[Tier, int]]) -> None:
        for tier, block_id in reversed(places):
            self._stores[tier].pool.give_back([block_id])

    def _forget_swapped(self, sequence: Sequence) -> None:
        if sequence.swapped is not None:
            self._host.pool.give_back(reversed(sequence.swapped.host_block_ids))
            sequence.swapped = None
            del self._swapped[sequence.id]
