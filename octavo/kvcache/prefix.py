"""Names for the contents of KV blocks: a chain of SHA-256 digests. Pure Python.

A block's KV depends on every token before it, so its key hashes its own tokens together with the
key of the block before. The first link holds what else the KV depends on, or what must keep tenants
apart: the adapter, media, a salt. Equal keys mean equal contents: nobody finds two inputs with the
same SHA-256, so a key decides and tokens need not be compared.
"""

import hashlib
from array import array
from collections.abc import Sequence as SequenceOf

from octavo.core import ImageInput, Sequence


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


def block_key_with_images(
    parent: bytes, token_ids: SequenceOf[int], start: int, images: SequenceOf[ImageInput]
) -> bytes:
    """The key of a full block from token `start` on: of its tokens, and of the images in it.

    All images have the same token, so it is their contents, and which of their rows these are, that
    tells blocks apart. A block without images has the key that `block_key` gives it.
    """
    end, digest = start + len(token_ids), hashlib.sha256(parent + array("q", token_ids).tobytes())
    for image in images:
        if image.start < end and image.end > start:
            name = image.key.encode()
            place = array("q", (len(name), image.start - start, image.num_tokens))
            digest.update(place.tobytes() + name)
    return digest.digest()


def key_of(sequence: Sequence, index: int, block_size: int) -> bytes:
    """The key of a sequence's full block; keys are computed once and kept with it."""
    keys = sequence.block_keys
    while len(keys) <= index:
        parent = keys[-1] if keys else chain_root(sequence.request.cache_extras)
        start = len(keys) * block_size
        token_ids = sequence.token_ids[start : start + block_size]
        if sequence.images:
            keys.append(block_key_with_images(parent, token_ids, start, sequence.images))
        else:
            keys.append(block_key(parent, token_ids))
    return keys[index]
