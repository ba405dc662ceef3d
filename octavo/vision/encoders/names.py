"""Names of tensors in checkpoints that older versions of transformers wrote."""

# LLaVA's published checkpoints have CLIP's class between the tower and its parts.
OLD_PREFIXES = {"vision_tower.vision_model.": "vision_tower."}


def current_name(name: str) -> str:
    """The name that transformers 5 writes, which is the one that `VisionEncoder.slots` has."""
    for old, new in OLD_PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
