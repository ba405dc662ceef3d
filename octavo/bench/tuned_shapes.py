"""What there is to tune: the weights of a model, as shapes, and a GPU to tune them on.

Does not need triton, so that a machine without it can be told what it lacks.
"""

import torch

from octavo.config import locate, read_model_config
from octavo.errors import ConfigError
from octavo.kernels import Case
from octavo.kernels.triton_support import unsupported
from octavo.layers import Build
from octavo.models import create_model
from octavo.models.weightless import NoWeights

Shape = tuple[int, int]  # (outputs, inputs): N and K of a weight


def require_gpu() -> None:
    """Raises ConfigError: no Triton kernel runs on this machine; the message says why."""
    if (reason := unsupported(Case("cuda", torch.bfloat16))) is not None:
        raise ConfigError(f"there is nothing to tune here: {reason}")


def parse_shape(text: str) -> Shape:
    """Shape of "N,K"; raises ConfigError."""
    parts = text.split(",")
    if len(parts) == 2 and all(part.isdigit() and int(part) for part in parts):
        return int(parts[0]), int(parts[1])
    raise ConfigError(f"--shape is N,K: the outputs and inputs of a weight; got {text!r}")


def model_shapes(model: str) -> list[Shape]:
    """The shape of each weight of a model, in the order in which they are made."""
    config = read_model_config(locate(model, weights=False))
    weights = NoWeights()
    create_model(config, Build("meta", torch.bfloat16, weights=weights), max_positions=1)
    return [(case.sizes["out_features"], case.sizes["in_features"]) for case in weights.cases]
