"""Qwen2.5-VL with videos, on a tiny random checkpoint: tokens are transformers'."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from octavo import LLM, SamplingParams
from octavo.config import locate, read_model_config
from octavo.core import StepPlan
from octavo.errors import CapacityError, InvalidImageError
from octavo.runner.images import ImageStore, largest_pictures
from octavo.testing.tiny_models import PREPROCESSORS, reference_logits, write_tiny_model
from octavo.vision import Video
from octavo.vision.prompts import ImageReader

NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
IMAGE, VIDEO = 302, 301
MERGED = 4  # patches in a token
BLOCK = 16


def picture(height, width, seed=0):
    noise = np.random.default_rng(seed + 1000 * height + width)
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(count, height, width, fps, seed=0):
    return Video(tuple(picture(height, width, seed + i) for i in range(count)), fps)


def prompt(*parts):
    """Of numbers, so many words, and of pictures and videos."""
    ids, images, videos = [], [], []
    for seed, part in enumerate(parts):
        if isinstance(part, int):
            ids += [(31 * i + 7 * seed) % 256 for i in range(part)]
        else:
            is_video = isinstance(part, Video)
            (videos if is_video else images).append(part)
            ids.append(VIDEO if is_video else IMAGE)
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": images, "video": videos}}


CAT = picture(30, 44, 1)
LONG, SLOW, ODD = clip(6, 24, 32, 2.0), clip(4, 32, 16, 0.7, seed=9), clip(3, 61, 17, 3.0, seed=20)
PROMPTS = [
    prompt(5, LONG, 9),
    prompt(7, CAT, 3, SLOW, 1, CAT, ODD, 20),
    prompt(20),
    prompt(ODD),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(directory of the checkpoint, transformers' model)"""
    directory = tmp_path_factory.mktemp("models") / "qwen2_5_vl"
    return directory, write_tiny_model(directory, "qwen2_5_vl")


@pytest.fixture(scope="module")
def model(tiny):
    return tiny[0]


def create_llm(model, **options):
    defaults = {"kv_cache_memory_bytes": 2**22, "dtype": "float32", "num_threads": 1}
    return LLM(str(model), **(defaults | options), check_integrity=True)


def generate(llm, prompts):
    return llm.generate(prompts, GREEDY, use_tqdm=False)


def tokens(llm, prompts=PROMPTS):
    return [output.outputs[0].token_ids for output in generate(llm, prompts)]


@pytest.fixture(scope="module")
def answers(model):
    return generate(create_llm(model), PROMPTS)


@pytest.fixture(scope="module")
def expected(answers):
    return [output.outputs[0].token_ids for output in answers]


def processed(data):
    """What transformers' processor makes of images and videos, frame by frame.

    Its image processor has each picture twice in a patch, as a video of two equal frames.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    process = Qwen2VLImageProcessorPil(**PREPROCESSORS["qwen2_5_vl"])
    inputs, patches, grids, seconds = {}, [], [], []
    if data["image"]:
        inputs |= process(data["image"], return_tensors="pt")
    for video in data["video"]:
        frames = [*video.frames, *video.frames[-1:] * (len(video.frames) % 2)]
        seen = [process([frame], return_tensors="pt") for frame in frames]
        halves = [one["pixel_values"].view(-1, 3, 2, 16)[:, :, :1] for one in seen]
        for first, second in zip(halves[::2], halves[1::2], strict=True):
            patches.append(torch.cat((first, second), dim=2).flatten(1))
        grids.append([len(frames) // 2, *seen[0]["image_grid_thw"][0, 1:].tolist()])
        seconds.append(2 / video.fps)
    if grids:
        inputs |= {
            "pixel_values_videos": torch.cat(patches),
            "video_grid_thw": torch.tensor(grids),
            "second_per_grid_ts": torch.tensor(seconds),
        }
    return inputs


@torch.inference_mode()
def test_tokens_and_likelihoods_are_those_of_transformers(tiny, answers):
    for one, output in zip(PROMPTS, answers, strict=True):
        answer = output.outputs[0]
        ids = torch.tensor([output.prompt_token_ids + answer.token_ids])
        types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        inputs = processed(one["multi_modal_data"])
        for video, grid in zip(
            one["multi_modal_data"]["video"], inputs.get("video_grid_thw", ()), strict=True
        ):
            assert grid[0] == -(-len(video.frames) // 2)
        logits = reference_logits(tiny[1], ids, mm_token_type_ids=types, **inputs)
        logits = logits[0, -NUM_TOKENS - 1 : -1]
        assert logits.argmax(-1).tolist() == answer.token_ids
        found = torch.tensor([step.logprob for step in answer.logprobs])
        likelihoods = logits.log_softmax(-1).max(-1).values
        torch.testing.assert_close(found, likelihoods, rtol=1e-4, atol=1e-4)
    assert len({token for answer in answers for token in answer.outputs[0].token_ids}) > 10


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 13, "max_num_seqs": 3, "async_scheduling": True},
        {"block_size": 4, "max_num_encoder_tokens": 1},  # a layer of frames at a time
        {"max_num_encoder_tokens": 30},  # a video in two pieces
        {"encoder_cache_memory_bytes": 40 * 64 * 4, "max_num_batched_tokens": 50},
    ],
    ids=str,
)
def test_no_way_of_batching_changes_the_text(model, expected, options):
    assert tokens(create_llm(model, **options)) == expected


def test_a_prefix_is_found_up_to_and_into_its_videos(model, expected):
    llm = create_llm(model)
    tokens(llm)
    again = generate(llm, PROMPTS)
    assert [output.outputs[0].token_ids for output in again] == expected
    assert again[1].num_cached_tokens == len(again[1].prompt_token_ids) // BLOCK * BLOCK


def test_the_same_frames_at_another_pace_are_no_hit(model):
    used, faster = create_llm(model), Video(LONG.frames, 0.25)
    [first] = generate(used, [prompt(5, LONG, 40)])
    [found] = generate(used, [prompt(5, faster, 40)])
    assert found.num_cached_tokens == 0
    assert found.outputs[0].token_ids == tokens(create_llm(model), [prompt(5, faster, 40)])[0]
    assert found.outputs[0].token_ids != first.outputs[0].token_ids


def test_a_list_of_pictures_is_a_video(model, expected):
    llm, frames = create_llm(model), list(LONG.frames)
    for data in ({"video": frames}, {"video": [frames]}, {"video": LONG}):
        [ids] = tokens(llm, [PROMPTS[0] | {"multi_modal_data": data}])
        assert ids == expected[0]  # two frames a second are what the processor looks at


class Encoder:
    """One that answers with as many rows as there are tokens, and notes how many at once."""

    def __init__(self):
        self.seen = []

    def __call__(self, inputs):
        self.seen.append([one.num_tokens for one in inputs])
        return [torch.from_numpy(one.values[: one.num_tokens]) for one in inputs]


def test_an_encoder_sees_no_more_at_once_than_a_step_may_make(model):
    config = read_model_config(locate(str(model)))
    reader = ImageReader.of(config)
    ids = [VIDEO, IMAGE, VIDEO]
    _, seen = reader.lay_out(ids, [CAT], [LONG, clip(32, 24, 32, 2.0)])
    encoder = Encoder()
    store = ImageStore(encoder, config, "cpu", max_num_encoder_tokens=30)
    store.update(StepPlan(0, (), (), (), pictures=seen.pictures))
    assert max(map(sum, encoder.seen)) <= 30
    counts = sorted(place.num_tokens for place in seen.places)
    assert sum(map(sum, encoder.seen)) == sum(counts) and counts[-1] == 16 * 12
    # One layer of frames is the least there is.
    encoder.seen.clear()
    store = ImageStore(encoder, config, "cpu", max_num_encoder_tokens=1)
    store.update(StepPlan(0, (), (), (), pictures=seen.pictures))
    assert {len(step) for step in encoder.seen} == {1} and len(encoder.seen) == 1 + 3 + 16


def test_the_memory_of_an_encoder_is_measured_with_the_largest_frames(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    processor = {"size": {"shortest_edge": 64, "longest_edge": 64 * 64}, "fps": 1.0}
    (tmp_path / "model" / "video_preprocessor_config.json").write_text(json.dumps(processor))
    config = create_llm(tmp_path / "model").engine.config
    [picture] = largest_pictures(dataclasses.replace(config, max_num_encoder_tokens=100))
    assert (picture.num_frames, picture.width, picture.height) == (2, 64, 64)
    assert config.model.videos.fps == 1.0


def test_what_is_no_video_is_refused(model, tmp_path):
    llm = create_llm(model, encoder_cache_memory_bytes=35 * 64 * 4)
    with pytest.raises(CapacityError, match="encoder_cache_memory_bytes"):
        generate(llm, [PROMPTS[0]])
    for data, message in (
        ({"video": b"bytes"}, "a list of PIL.Image.Image or an octavo.vision.Video, not bytes"),
        ({"video": [[b"bytes"]]}, "must be a PIL"),
        ({"video": [CAT, picture(20, 20)]}, "one size"),
        ({"video": [[CAT]], "image": [CAT]}, "0 places for images, but there are 1"),
        ({"video": [CAT] * 65}, "65 frames; the limit is 64"),
    ):
        with pytest.raises(InvalidImageError, match=message):
            generate(llm, [PROMPTS[3] | {"multi_modal_data": data}])
    write_tiny_model(tmp_path, "llava")
    with pytest.raises(InvalidImageError, match="takes images, not videos"):
        generate(create_llm(tmp_path), [PROMPTS[3]])
