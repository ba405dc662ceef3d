"""Which kernel, in which block sizes, multiplies few rows by a weight [N, K].

Owns the tables and the formula for shapes that no table has. `block_sizes.json` beside this file is
ours; what `octavo tune kernels` measured on the user's machine comes before it. Does not know the
kernels, nor triton.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from octavo.errors import ConfigError

# Numbers of rows that have an entry of their own; what lies between takes the next one up. Beyond
# the last a product is bound by arithmetic, where cuBLAS is at home.
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHIPPED = Path(__file__).with_name("block_sizes.json")
# Devices that run well by another's table: the same processor beside faster memory.
LIKE = {"NVIDIA H200": "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe": "NVIDIA H100 80GB HBM3"}
NUM_PROCESSORS, SHARED_BYTES = 132, 227 << 10  # where there is no GPU to ask: the H100's
# Shared memory of a program by compute capability (CUDA guide, table of technical specifications).
SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
LEAST_SHARED_KIB = 99
SMALLEST_SHARE = 256  # inputs that are worth a program of their own


@dataclass(frozen=True, slots=True)
class Blocks:
    """One way to launch a product of rows [T, K] by a weight [N, K]."""

    kernel: str  # "gemv": multiplies and adds; "gemm": matrix instructions; "held": these, at once
    outputs: int  # of the N that one program makes
    depth: int  # of the K that it takes at a time; for "held" its whole part
    rows: int = 1  # of the T that it makes
    splits: int = 1  # parts of K that are summed apart, and added up in their order
    prefetch: int = 0  # "gemm": KiB of each row of the weight asked for before the inputs are there
    warps: int = 4
    stages: int = 1  # blocks in flight
    spread: bool = True  # each part of K has a program of its own


Plan = tuple[Blocks | None, ...]  # one for each of ROW_BUCKETS; None: torch's own product is faster
Entries = dict[str, dict[str, Any] | None]  # by rows: the fields of Blocks, but for defaults
Table = dict[str, dict[str, Entries]]  # by device, and "NxK"


def bucket(num_rows: int) -> int:
    """The index in ROW_BUCKETS of the entry for so many rows, 1 to 256."""
    return (num_rows - 1).bit_length()


def user_table_path() -> Path:
    """Where `octavo tune kernels` writes: OCTAVO_CACHE_DIR, else the user's XDG cache folder."""
    chosen = os.environ.get("OCTAVO_CACHE_DIR")
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo"
    return (Path(chosen) if chosen else cached) / SHIPPED.name


def read_table(path: Path) -> Table:
    """The table in a file; an empty one where there is no file.

    Raises:
        ConfigError: the file is no table.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for shapes in table.values():
            for entries in shapes.values():
                for blocks in entries.values():
                    _parse(blocks)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no table of block sizes ({error}); delete it") from error
    found: Table = table
    return found


def write_table(path: Path, table: Table) -> None:
    """One line for each entry, so that two tables can be compared by eye."""
    lines = []
    for device, shapes in sorted(table.items()):
        texts = []
        for shape, entries in sorted(shapes.items(), key=lambda item: _shape_of(item[0])):
            rows = [f'   "{t}": {json.dumps(entry)}' for t, entry in entries.items()]
            texts.append(f'  "{shape}": {{\n' + ",\n".join(rows) + "\n  }")
        lines.append(f' "{device}": {{\n' + ",\n".join(texts) + "\n }")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def merged(base: Table, new: Table) -> Table:
    """`new` before `base`, shape by shape."""
    return {device: {**base.get(device, {}), **new.get(device, {})} for device in base.keys() | new}


def as_entry(blocks: Blocks | None) -> dict[str, Any] | None:
    """As a table holds it: what differs from the defaults."""
    if blocks is None:
        return None
    kept = ("kernel", "outputs", "depth")
    default = Blocks(*(getattr(blocks, name) for name in kept))
    return {
        name: value
        for name, value in asdict(blocks).items()
        if name in kept or value != getattr(default, name)
    }


def plan_of(entries: Entries) -> Plan:
    """The plan that the entries of one shape are."""
    return tuple(_parse(entries.get(str(rows))) for rows in ROW_BUCKETS)


def _parse(entry: Mapping[str, Any] | None) -> Blocks | None:
    return None if entry is None else Blocks(**entry)


def _shape_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


@cache
def _tables() -> tuple[Table, ...]:
    return read_table(user_table_path()), read_table(SHIPPED)


@cache
def plan_for(device: str, outputs: int, depth: int) -> Plan:
    """The plan for a weight [outputs, depth] on a torch device such as "cuda:0"."""
    name, processors, room = None, NUM_PROCESSORS, SHARED_BYTES
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        name, processors = properties.name, properties.multi_processor_count
        room = SHARED_KIB.get((properties.major, properties.minor), LEAST_SHARED_KIB) << 10
    for table in _tables():
        for known in (name, LIKE.get(name or "")):
            entries = table.get(known or "", {}).get(f"{outputs}x{depth}")
            if entries is not None:
                return plan_of(entries)
    plan = (formula(outputs, depth, rows, processors) for rows in ROW_BUCKETS)
    return tuple(b if b is not None and shared_bytes(b) <= room else None for b in plan)


def shared_bytes(blocks: Blocks) -> int:
    """Shared memory of a program, in bytes, but for what sums and alignment take."""
    return (
        2
        * blocks.depth
        * (blocks.outputs + blocks.rows)
        * blocks.stages
        * (blocks.kernel != "gemv")
    )


def formula(outputs: int, depth: int, rows: int, processors: int = NUM_PROCESSORS) -> Blocks | None:
    """A fair choice for any shape, of the kind that the measured tables have for theirs."""
    if rows == 1 or (rows == 2 and depth <= 16_384):
        return gemv_blocks(depth, rows)
    if rows > 128 or depth % 16:
        return None
    programs = -(-outputs // 64) * -(-depth // 512)
    if rows <= 64 and programs <= processors and depth >= 512:
        return Blocks("held", 64, 512, max(rows, 16), warps=8)
    tall = 128 if rows > 32 and outputs >= 128 * processors // 2 else 64
    splits = even_splits(-(-outputs // tall), depth, 2 * processors)
    wide = 128 if rows <= 32 else 64
    return Blocks("gemm", tall, wide, max(rows, 16), splits, prefetch=1, stages=4)


def gemv_blocks(depth: int, rows: int = 1) -> Blocks:
    """Programs of 16 to 64 weights a thread. Of several rows, a program takes all of K at once."""
    wide = min(2048 if rows == 1 else 16_384, max(128, _power_of_2(depth)))
    tall = max(1, min(4, 4096 // wide))
    return Blocks("gemv", tall, wide, rows, warps=max(1, min(16, tall * wide // 1024)))


def even_splits(num_tiles: int, depth: int, programs: int) -> int:
    """Into how many parts K is cut, so that about `programs` programs run."""
    return max(1, min(programs // num_tiles, depth // SMALLEST_SHARE, 8))


def invariant_plan(outputs: int, depth: int) -> tuple[Plan, Blocks]:
    """The plan of a product whose bits do not depend on T, and what it does beyond the last bucket.

    K is cut into the same parts for every T: by as many programs where there are few rows, and
    one part after the other in one program where rows alone fill the machine. Nothing here may
    depend on the device or on a table, as two machines are to agree.
    """
    splits = max(1, min(2 * NUM_PROCESSORS // -(-outputs // 64), depth // 512, 4))
    plan = []
    for rows in ROW_BUCKETS:
        tiles = -(-outputs // 128) * -(-rows // 128)
        if rows > 64 and tiles >= NUM_PROCESSORS:
            plan.append(Blocks("gemm", 128, 64, 128, splits, warps=8, stages=4, spread=False))
            continue
        wide = min(64, max(rows, 16))
        tiles = -(-outputs // 64) * -(-rows // wide)
        # Parts by many programs cost a round trip of their sums through memory.
        spread = splits > 1 and (rows <= 64 or tiles < NUM_PROCESSORS // 2)
        plan.append(Blocks("gemm", 64, 128, wide, splits, 1, stages=4, spread=spread))
    # A sum of parts takes the registers in which it could hold more rows.
    wide = 256 if splits == 1 else 128
    return tuple(plan), Blocks("gemm", 128, 64, wide, splits, warps=8, stages=4, spread=False)


def partial_tiles(plan: Sequence[Blocks | None], outputs: int) -> int:
    """The most tiles, within the buckets, whose parts of K are made by several programs."""
    counts = [
        -(-outputs // blocks.outputs) * -(-rows // blocks.rows)
        for rows, blocks in zip(ROW_BUCKETS, plan, strict=True)
        if blocks is not None and blocks.spread and (blocks.splits > 1 or blocks.kernel == "held")
    ]
    return max(counts, default=0)


def _power_of_2(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << (number - 1).bit_length()
