"""What families with mixtures of experts share."""

from octavo.config.model import MLPConfig, MoEConfig
from octavo.config.reading import MAX_HIDDEN_SIZE, Reader

MAX_EXPERTS = 2**12


def mixture(
    read: Reader,
    *,
    count: str,
    size: str,
    norm_topk_prob: bool,
    scaling_factor: float = 1.0,
    groups: tuple[int, int] = (1, 1),
    num_shared: int = 0,
) -> MoEConfig:
    """A mixture of experts.

    Args:
        read: the config.
        count: its name of the number of experts.
        size: its name of the inner size of one.
        norm_topk_prob: as `MoEConfig`'s.
        scaling_factor: as `MoEConfig`'s.
        groups: how many there are, and how many of them a token chooses experts from.
        num_shared: experts that every token goes through. They are stored, and run, as one.
    """
    num_experts = read.integer(count, 1, MAX_EXPERTS)
    num_groups, num_best = groups
    if num_experts % num_groups:
        raise read.wrong("n_group", num_groups, f"a divisor of {count}={num_experts}")
    most = num_experts // num_groups * num_best
    inner = read.integer(size, 1, MAX_HIDDEN_SIZE)
    return MoEConfig(
        num_experts=num_experts,
        num_experts_per_token=read.integer("num_experts_per_tok", 1, most),
        intermediate_size=inner,
        norm_topk_prob=norm_topk_prob,
        scaling_factor=scaling_factor,
        num_groups=num_groups,
        num_groups_per_token=num_best,
        shared=(
            MLPConfig(inner * num_shared, bias=read.boolean("mlp_bias", False))
            if num_shared
            else None
        ),
    )
