"""The memory below the device as the options ask for it. Knows no scheduling."""

import dataclasses
import hashlib
from pathlib import Path

from octavo.config import Checkpoint, ResolvedConfig
from octavo.runner import DiskFile

KV_DIRECTORY = Path("~/.cache/octavo/kv")


def open_disk(checkpoint: Checkpoint, config: ResolvedConfig) -> DiskFile | None:
    """The file of KV blocks, with what an earlier run of the same model left in it.

    Raises:
        ConfigError: the file cannot be opened, or another engine uses it.
    """
    if not config.num_disk_blocks:
        return None
    name = checkpoint.name.replace("/", "--")
    path = Path(config.kv_offloading_disk_path or KV_DIRECTORY / f"{name}-{config.dtype}.kv")
    return DiskFile(
        path.expanduser(),
        num_slots=config.num_disk_blocks,
        block_bytes=config.kv_block_bytes,
        fingerprint=kv_fingerprint(checkpoint, config),
    )


def kv_fingerprint(checkpoint: Checkpoint, config: ResolvedConfig) -> bytes:
    """32 bytes that say what the numbers of a KV block mean, and which weights they came from.

    Weights are known by their files' names, sizes and times of change: to read them all would take
    longer than to compute the prefixes again.
    """
    root = checkpoint.path
    files = sorted(root.iterdir()) if root.is_dir() else [root]
    stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    meaning = (
        dataclasses.asdict(config.model),
        config.dtype,
        config.device,
        config.block_size,
        config.load_format,
        stamps,
    )
    return hashlib.sha256(repr(meaning).encode()).digest()
