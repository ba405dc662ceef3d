"""Encoders' budget and what is kept of images: held to random requests, plans and failures."""

import random

import pytest

from octavo.core import ImageInput, Picture, Request, SamplingParams, SeenImages, StepResult
from octavo.core import SampledTokens as Sampled
from octavo.errors import CapacityError
from octavo.kvcache import create_allocator
from octavo.scheduler import SchedulerSettings, create_scheduler


def request(name, images, *, gap=3):
    """`images` are (content, tokens); words stand before, between and behind them."""
    token_ids, places = [1] * gap, []
    for key, num_tokens in images:
        places.append(ImageInput(key, len(token_ids), num_tokens))
        token_ids += [9] * num_tokens + [2] * gap
    seen = SeenImages(tuple(places), tuple(Picture(key, 2, 2) for key in dict(images)))
    return Request(
        request_id=name,
        prompt_token_ids=token_ids,
        sampling=SamplingParams(max_tokens=3),
        seed=0,
        images=seen,
    )


def create(**settings):
    defaults = {
        "max_num_batched_tokens": 24,
        "max_num_seqs": 4,
        "max_model_len": 256,
        "num_cached_image_tokens": 20,
        "max_num_encoder_tokens": 12,
    }
    allocator = create_allocator("paged+prefix", 64, 4, max_model_len=256)
    return create_scheduler(allocator, SchedulerSettings(**defaults | settings))


class Device:
    """What a runner holds, by plans alone; complains where a token's image is not there."""

    def __init__(self, max_num_tokens):
        self.max_num_tokens = max_num_tokens
        self.kept = set()
        self.sequences = {}
        self.num_encoded = 0

    def run(self, plan):
        self.kept -= set(plan.forgotten_images)
        self.kept |= {picture.key for picture in plan.pictures}
        self.num_encoded += len(plan.pictures)
        for name in plan.dropped:
            self.sequences.pop(name, None)
        for new in plan.new:
            self.sequences[new.sequence_id] = [new.num_computed_tokens, new.images]
        sampled = []
        for share in plan.scheduled:
            start, images = self.sequences[share.sequence_id]
            for image in images:
                if image.start < start + share.num_tokens and image.end > start:
                    assert image.key in self.kept
            self.sequences[share.sequence_id][0] += share.num_tokens
            if share.samples:
                sampled.append(Sampled(share.sequence_id, (5,)))
        return StepResult(plan.step, tuple(sampled))


def step(scheduler, device):
    plan = scheduler.schedule()
    sizes = {i.key: i.num_tokens for _, images in device.sequences.values() for i in images}
    sizes |= {i.key: i.num_tokens for new in plan.new for i in new.images}
    events = scheduler.commit(plan, device.run(plan))
    scheduler.check_integrity()
    assert sum(sizes[key] for key in device.kept if key in sizes) <= device.max_num_tokens
    return plan, events


def run_to_end(scheduler, device):
    ended = []
    for _ in range(200):
        if not scheduler.has_work:
            return ended
        ended += [e.request_id for e in step(scheduler, device)[1] if e.finish_reason]
    raise AssertionError("requests wait for ever")


def test_tokens_before_an_image_run_while_it_waits_for_its_turn():
    scheduler, device = create(), Device(20)
    scheduler.add(request("a", [("cat", 8)]))
    scheduler.add(request("b", [("dog", 8)]))
    plan, _ = step(scheduler, device)
    assert {s.sequence_id: s.num_tokens for s in plan.scheduled} == {"a": 14, "b": 3}
    assert [picture.key for picture in plan.pictures] == ["cat"]
    plan, _ = step(scheduler, device)
    assert {s.sequence_id: s.num_tokens for s in plan.scheduled} == {"a": 1, "b": 11}
    assert [picture.key for picture in plan.pictures] == ["dog"]


def test_a_content_is_encoded_once_for_all_who_show_it():
    scheduler, device = create(), Device(20)
    for name in "abc":
        scheduler.add(request(name, [("cat", 8), ("cat", 8)]))
    assert sorted(run_to_end(scheduler, device)) == ["a", "b", "c"]
    assert device.num_encoded == 1


def test_an_image_above_the_budget_goes_alone_and_one_above_the_memory_is_refused():
    scheduler, device = create(), Device(20)
    scheduler.add(request("a", [("wide", 20), ("cat", 8)]))
    scheduler.add(request("b", [("dog", 8)]))
    plan, _ = step(scheduler, device)
    assert [picture.key for picture in plan.pictures] == ["wide"]
    assert sorted(run_to_end(scheduler, device)) == ["a", "b"]
    with pytest.raises(CapacityError, match="21 tokens is larger"):
        scheduler.add(request("c", [("wider", 21)]))
    assert not scheduler.has_work


def test_after_a_failed_step_its_images_are_encoded_again():
    scheduler, device = create(), Device(20)
    scheduler.add(request("a", [("cat", 8)]))
    failed = scheduler.schedule()
    assert [picture.key for picture in failed.pictures] == ["cat"]
    scheduler.discard(failed)  # the runner never saw it
    scheduler.check_integrity()
    plan, _ = step(scheduler, device)
    assert [picture.key for picture in plan.pictures] == ["cat"]
    assert run_to_end(scheduler, device) == ["a"]


def test_what_is_forgotten_is_not_counted_on():
    scheduler, device = create(), Device(20)
    scheduler.add(request("a", [("cat", 8)]))
    run_to_end(scheduler, device)
    scheduler.allocator.forget_all()
    scheduler.images.forget_all()
    device.kept.clear()
    scheduler.add(request("b", [("cat", 8)]))
    assert run_to_end(scheduler, device) == ["b"]
    assert device.num_encoded == 2


@pytest.mark.parametrize("seed", range(40))
def test_whatever_comes_everybody_ends_and_no_token_misses_its_image(seed):
    draw = random.Random(seed)
    num_kept = draw.randrange(8, 40)
    scheduler = create(
        num_cached_image_tokens=num_kept,
        max_num_encoder_tokens=draw.randrange(1, 30),
        max_num_batched_tokens=draw.randrange(3, 40),
    )
    device, names = Device(num_kept), []
    sizes = {f"image-{i}": draw.randrange(1, num_kept + 1) for i in range(6)}
    ended = []
    for i in range(12):
        images = [(key, sizes[key]) for key in draw.choices(list(sizes), k=draw.randrange(4))]
        names.append(f"r{i}")
        scheduler.add(request(names[-1], images, gap=draw.randrange(1, 4)))
        for _ in range(draw.randrange(3)):
            if draw.random() < 0.2:
                scheduler.discard(scheduler.schedule())
            else:
                ended += [e.request_id for e in step(scheduler, device)[1] if e.finish_reason]
    ended += run_to_end(scheduler, device)
    assert sorted(ended) == sorted(names)
