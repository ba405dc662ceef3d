"""What a copy that failed has spoilt: contents are copied on before anybody knows. Pure Python."""

from collections.abc import Sequence as SequenceOf

from octavo.core import StepPlan, Tier

Place = tuple[Tier, int]  # a block of a tier


def spoilt_places(failed: SequenceOf[int], plans: SequenceOf[StepPlan]) -> set[Place]:
    """The places whose content is lost, when these transfers of the first plan failed.

    The other plans were made since, oldest first: a copy of what is lost is lost as well, and a
    good copy over it heals a place. What cannot be read from its source is lost there, too.
    """
    bad: set[Place] = set()
    unreadable: set[Place] = set()
    for number, plan in enumerate(plans):
        for index, transfer in enumerate(plan.transfers):
            source = (transfer.source_tier, transfer.source)
            target = (transfer.target_tier, transfer.target)
            if number == 0 and index in failed:
                bad.add(target)
                if transfer.source_tier is not Tier.DEVICE:
                    unreadable.add(source)
            elif source in bad:
                bad.add(target)
            else:
                bad.discard(target)
    return bad | unreadable
