"""LoRA adapters as the engine names them. Knows no tensors and no files."""

import msgspec


class Adapter(msgspec.Struct, frozen=True):
    """One version of a LoRA adapter (arXiv 2106.09685).

    The digest is of its files' contents, so a name that is loaded again with other contents is
    another version, whose KV nobody takes for that of the one before.
    """

    name: str  # what clients put in the field `model`
    digest: str
