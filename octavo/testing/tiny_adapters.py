"""Small random LoRA adapters in PEFT's layout, and their base with one of them merged in.

For tests: merging is what PEFT's `merge_and_unload` does, W + scale * B A.
"""

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    directory: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int = 4,
    modules: Iterable[str] = ALL,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write an adapter for the modules whose names end like that; return the directory.

    Args:
        directory: where to; it is made.
        shapes: {module: (rows, columns)} of the base's matrices.
        rank: of the adapter.
        modules: ends of the names of those that it changes.
        seed: of the weights.
        changes: replace entries of `adapter_config.json`.
    """
    generator = torch.Generator().manual_seed(seed)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(modules),
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
    }
    tensors: dict[str, Tensor] = {}
    for module, (rows, columns) in shapes.items():
        if module.endswith(tuple(modules)):
            a = torch.randn(rank, columns, generator=generator) * columns**-0.5
            b = torch.randn(rows, rank, generator=generator) * 0.3 * rank**-0.5
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@torch.no_grad()
def merged(model: nn.Module, directory: Path) -> nn.Module:
    """A copy of transformers' model with an adapter's products in its weights."""
    config = json.loads((directory / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
    tensors = load_file(directory / "adapter_model.safetensors")
    copied = copy.deepcopy(model)
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            product = scale * tensors[f"{module}.lora_B.weight"] @ a
            layer = copied.get_submodule(module.removeprefix("base_model.model."))
            weight: Any = layer.weight
            weight += product if isinstance(layer, nn.Linear) else product.t()  # Conv1D
    return copied


def matrices_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{module: (outputs, inputs)} of a transformers model's linear layers, Conv1D among them."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = (module.out_features, module.in_features)
        elif type(module).__name__ == "Conv1D":
            weight: Any = module.weight
            found[name] = (weight.shape[1], weight.shape[0])
    return found
