"""From a model's config to what clients may ask of it."""

from typing import cast

from octavo.config import ModelConfig
from octavo.core import ModelTasks, PoolingParams, PoolingType


def tasks_of(model: ModelConfig) -> ModelTasks:
    """What the model can be asked for."""
    pooling = cast(PoolingType, model.pooling)  # `PoolingParams` checks it
    return ModelTasks(
        generates=not model.is_encoder,
        embedding=PoolingParams(pooling=pooling, normalize=model.normalizes),
        num_classes=0 if model.class_head is None else model.class_head.num_classes,
        num_token_types=max(1, model.num_token_types),
    )
