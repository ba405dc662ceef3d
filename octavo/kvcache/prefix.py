"""Names for the contents of KV blocks: a chain of SHA-256 digests. Pure Python.

A block's KV depends on every token before it, so its key hashes its own tokens together with the
key of the block before. The first link holds what else the KV depends on, or what must keep tenants
apart: the adapter, media, a salt. Equal keys mean equal contents: nobody finds two inputs with the
same SHA-256, so a key decides and tokens need not be compared.
"""

import hashlib
from array import array
from collections.abc import Sequence as SequenceOf


def chain_root(extras: SequenceOf[str]) -> bytes:
    """The key before the first block. Requests with different `extras` never share a block."""
    digest = hashlib.sha256(b"octavo-kv-1")
    for extra in extras:
        encoded = extra.encode()
        # The length first: ("ab", "c") and ("a", "bc") must not be the same.
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def block_key(parent: bytes, token_ids: SequenceOf[int]) -> bytes:
    """The key of a full block, given the key of the one before it."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()
