"""Models that see, on tiny random checkpoints: tokens are transformers', whatever a step cuts."""

import dataclasses
import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from octavo import LLM, SamplingParams
from octavo.config import locate, read_model_config
from octavo.config.planned_vision import encoder_parts
from octavo.errors import CapacityError, CheckpointError, InvalidImageError
from octavo.runner.images import largest_pictures
from octavo.testing.tiny_models import TINY_MODELS, reference_logits, write_tiny_model
from octavo.text import load_tokenizer
from octavo.vision import num_image_tokens
from octavo.vision.prompts import ImageReader

NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
PLACEHOLDER = 302
BLOCK = 16


def picture(height, width, seed=0):
    noise = np.random.default_rng(seed + 1000 * height + width)
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def words(count, seed=0):
    return [(31 * i + 7 * seed) % 256 for i in range(count)]


def prompt(*parts):
    """Of numbers, so many words, and pictures."""
    ids, images = [], []
    for seed, part in enumerate(parts):
        if isinstance(part, int):
            ids += words(part, seed)
        else:
            ids.append(PLACEHOLDER)
            images.append(part)
    data = {"multi_modal_data": {"image": images}} if images else {}
    return {"prompt_token_ids": ids} | data


CAT, DOG, CAR = picture(30, 44, 1), picture(61, 17, 2), picture(28, 28, 3)
PROMPTS = [
    prompt(5, CAT, 9),
    prompt(33, CAT, 1, DOG, 2, CAT, 20, CAR, 3),
    prompt(20),
    prompt(DOG, 2),
    prompt(17, CAR),
]


def create_llm(model, **options):
    defaults = {"kv_cache_memory_bytes": 2**22, "dtype": "float32", "num_threads": 1}
    return LLM(str(model), **(defaults | options), check_integrity=True)


def generate(llm, prompts):
    return llm.generate(prompts, GREEDY, use_tqdm=False)


def tokens(llm, prompts=PROMPTS):
    return [output.outputs[0].token_ids for output in generate(llm, prompts)]


# transformers' processors, and tokens of the largest image here.
PROCESSORS = {
    "llava": ("clip", "CLIPImageProcessorPil", 16),
    "llava_next": ("llava_next", "LlavaNextImageProcessorPil", 16 + 64 + 8),
    "blip2": ("blip", "BlipImageProcessorPil", 18),
    "minigpt4": ("blip", "BlipImageProcessorPil", 18),
    "qwen2_5_vl": ("qwen2_vl", "Qwen2VLImageProcessorPil", 25),
}


# Of shapes that are no architecture of their own: which one, and what differs.
LLAMA = TINY_MODELS["llava"]["text_config"]
SHAPES = {"minigpt4": ("blip2", {"text_config": LLAMA})}


@pytest.fixture(scope="module", params=PROCESSORS)
def tiny(request, tmp_path_factory):
    """(directory of the checkpoint, transformers' model)"""
    directory = tmp_path_factory.mktemp("models") / request.param
    architecture, changes = SHAPES.get(request.param, (request.param, {}))
    return directory, write_tiny_model(directory, architecture, **changes)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny[0]


@pytest.fixture(scope="module")
def image_bytes(model):
    """Bytes of the largest image's rows."""
    return PROCESSORS[model.name][2] * 64 * 4


@pytest.fixture(scope="module")
def answers(model):
    """All prompts together, none of them cut."""
    return generate(create_llm(model), PROMPTS)


@pytest.fixture(scope="module")
def expected(answers):
    return [output.outputs[0].token_ids for output in answers]


@torch.inference_mode()
def test_tokens_and_likelihoods_are_those_of_transformers(tiny, answers):
    folder, name, _ = PROCESSORS[tiny[0].name]
    module = importlib.import_module(f"transformers.models.{folder}.image_processing_pil_{folder}")
    config = json.loads((tiny[0] / "preprocessor_config.json").read_text())
    process = getattr(module, name)(**config)
    for one, output in zip(PROMPTS, answers, strict=True):
        answer, inputs = output.outputs[0], {}
        if images := one.get("multi_modal_data", {}).get("image"):
            inputs = process(images, return_tensors="pt")
        ids = torch.tensor([output.prompt_token_ids + answer.token_ids])
        if tiny[0].name == "qwen2_5_vl":
            inputs["mm_token_type_ids"] = (ids == PLACEHOLDER).int()
        logits = reference_logits(tiny[1], ids, **inputs)[0, -NUM_TOKENS - 1 : -1]
        assert logits.argmax(-1).tolist() == answer.token_ids
        found = torch.tensor([step.logprob for step in answer.logprobs])
        likelihoods = logits.log_softmax(-1).max(-1).values
        torch.testing.assert_close(found, likelihoods, rtol=1e-4, atol=1e-4)
    assert len({token for answer in answers for token in answer.outputs[0].token_ids}) > 10


def test_weights_of_the_encoder_are_as_many_as_planned(tiny):
    vision = read_model_config(locate(str(tiny[0]))).vision
    planned = sum(
        copies * (sum(rows * columns for rows, columns in matrices) + num_values)
        for matrices, num_values, copies in encoder_parts(vision)
    )
    # CLIP's last layer lies behind the one that is asked for: nobody holds it.
    without = ("language_model", "lm_head", "post_layernorm.", "vision_tower.encoder.layers.2.")
    if not tiny[0].name.startswith("llava"):
        without = without[:2]
    theirs = tiny[1].named_parameters()
    assert planned == sum(p.numel() for n, p in theirs if not any(one in n for one in without))


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        # A chunk ends within an image, and the next one begins there.
        {"max_num_batched_tokens": 13, "max_num_seqs": 3, "async_scheduling": True},
        {"block_size": 4, "max_num_encoder_tokens": 1},
        # Room for two images: those of the second prompt take turns.
        {"images": 2, "max_num_batched_tokens": 50},
        {"images": 1, "async_scheduling": True},
    ],
    ids=str,
)
def test_no_way_of_batching_changes_the_text(model, expected, image_bytes, options):
    options = dict(options)
    if num_images := options.pop("images", 0):
        options["encoder_cache_memory_bytes"] = num_images * image_bytes
    assert tokens(create_llm(model, **options)) == expected


def test_a_prefix_is_found_up_to_and_into_its_images(model, expected, image_bytes):
    llm = create_llm(model)
    tokens(llm)
    again = generate(llm, PROMPTS)
    assert [output.outputs[0].token_ids for output in again] == expected
    assert again[1].num_cached_tokens == len(again[1].prompt_token_ids) // BLOCK * BLOCK
    # The last token that is found stands within the image, whose rows are gone by then.
    small = create_llm(model, encoder_cache_memory_bytes=image_bytes)
    longer = prompt(17, CAR, 9)
    [first] = tokens(create_llm(model), [longer])
    [shorter] = generate(small, [prompt(17, CAR)])
    generate(small, [prompt(2, DOG)])
    [second] = generate(small, [longer])
    assert second.outputs[0].token_ids == first
    end = len(shorter.prompt_token_ids)  # of the image
    assert 17 < second.num_cached_tokens < end
    assert second.num_cached_tokens == end // BLOCK * BLOCK


def test_another_image_under_the_same_text_is_no_hit(model):
    fresh, used = create_llm(model), create_llm(model)
    generate(used, [prompt(5, CAT, 40)])
    [apart] = generate(fresh, [prompt(5, DOG, 40)])
    [found] = generate(used, [prompt(5, DOG, 40)])
    assert found.num_cached_tokens == 0
    assert found.outputs[0].token_ids == apart.outputs[0].token_ids
    assert found.outputs[0].token_ids != tokens(fresh, [prompt(5, CAT, 40)])[0]
    # Of a salt, neither the prefix nor the image is found.
    [salted] = generate(used, [prompt(5, DOG, 40) | {"cache_salt": "mine"}])
    assert salted.num_cached_tokens == 0
    assert salted.outputs[0].token_ids == apart.outputs[0].token_ids


def test_preemption_does_not_change_the_text(model):
    roomy = create_llm(model)
    [one] = generate(roomy, [prompt(CAT)])
    room = (10 - len(one.prompt_token_ids)) % BLOCK
    crowd = [prompt(picture(30, 44, seed), room) for seed in range(6)]
    # All are of one length: three of them start, and each is soon to grow by a block.
    blocks = -(-(len(one.prompt_token_ids) + room) // BLOCK)
    tight_bytes = (3 * blocks + 2) * roomy.engine.config.kv_block_bytes
    limit = (blocks + 1) * BLOCK
    tight = create_llm(model, kv_cache_memory_bytes=tight_bytes, max_model_len=limit)
    assert tokens(tight, crowd) == tokens(roomy, crowd)
    assert tight.stats().num_preemptions > roomy.stats().num_preemptions


def test_all_answers_to_a_prompt_see_its_image(model, image_bytes):
    sampling = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=NUM_TOKENS, ignore_eos=True)
    llm = create_llm(model, encoder_cache_memory_bytes=image_bytes)
    [alone] = llm.generate([PROMPTS[1]], sampling, use_tqdm=False)
    blocks = -(-(len(alone.prompt_token_ids) + NUM_TOKENS) // BLOCK)
    tight_bytes = (blocks + 1) * llm.engine.config.kv_block_bytes
    tight = create_llm(model, kv_cache_memory_bytes=tight_bytes, max_model_len=blocks * BLOCK)
    [crowded] = tight.generate([PROMPTS[1]], sampling, use_tqdm=False)
    assert [a.token_ids for a in alone.outputs] == [a.token_ids for a in crowded.outputs]
    assert len({tuple(answer.token_ids) for answer in alone.outputs}) == 3


def test_what_cannot_be_seen_is_refused(model, tmp_path):
    llm = create_llm(model, encoder_cache_memory_bytes=15 * 64 * 4)  # a row less than any has
    with pytest.raises(CapacityError, match="encoder_cache_memory_bytes"):
        generate(llm, [PROMPTS[0]])
    llm = create_llm(model)
    with pytest.raises(InvalidImageError, match="1 places for images, but there are 2"):
        generate(llm, [PROMPTS[0] | {"multi_modal_data": {"image": [CAT, CAT]}}])
    with pytest.raises(InvalidImageError, match=r"not within the limits"):
        generate(llm, [prompt(picture(1, 40), 3)])
    with pytest.raises(InvalidImageError, match="not audio"):
        generate(llm, [PROMPTS[0] | {"multi_modal_data": {"audio": [CAT]}}])
    with pytest.raises(InvalidImageError, match="PIL"):
        generate(llm, [PROMPTS[0] | {"multi_modal_data": {"image": b"bytes"}}])
    write_tiny_model(tmp_path / "blind", "llama")
    with pytest.raises(InvalidImageError, match="sees no images"):
        generate(create_llm(tmp_path / "blind"), [PROMPTS[0]])
    assert len(tokens(llm, PROMPTS[:1])[0]) == NUM_TOKENS  # and it goes on


def test_blip2s_images_come_before_all_else_where_the_prompt_names_no_place(tmp_path):
    write_tiny_model(tmp_path, "blip2")
    llm = create_llm(tmp_path)
    text = "Question: what is this? Answer:"
    data = {"multi_modal_data": {"image": [CAT, DOG]}}
    ids = load_tokenizer(locate(str(tmp_path))).encode(text)
    named = [PLACEHOLDER, PLACEHOLDER, *ids]
    outputs = generate(llm, [{"prompt": text} | data, {"prompt_token_ids": named} | data])
    assert outputs[0].prompt_token_ids == [PLACEHOLDER] * 36 + ids
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_an_engine_that_slept_encodes_anew(model, expected):
    llm = create_llm(model)
    assert tokens(llm) == expected
    llm.sleep()
    llm.wake_up()
    assert tokens(llm) == expected


def test_old_names_of_the_tower_are_known(tmp_path):
    """LLaVA's published checkpoints have CLIP's class between the tower and its parts."""
    write_tiny_model(tmp_path / "new", "llava")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    tensors = load_file(file)
    renamed = {
        n.replace("vision_tower.", "vision_tower.vision_model."): t for n, t in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file)
    new, old = (tokens(create_llm(tmp_path / name), PROMPTS[:2]) for name in ("new", "old"))
    assert new == old


def test_a_checkpoint_without_its_image_processor_is_refused(tmp_path):
    write_tiny_model(tmp_path, "llava")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="nobody knows how its images are prepared"):
        create_llm(tmp_path)


def test_the_largest_step_of_an_encoder_keeps_to_its_limits(model, image_bytes):
    engine = create_llm(model, encoder_cache_memory_bytes=3 * image_bytes).engine
    config = dataclasses.replace(engine.config, max_num_encoder_tokens=10**6)
    pictures = largest_pictures(config)
    reader = ImageReader.of(config.model)
    size = (pictures[0].height, pictures[0].width)
    each = num_image_tokens(reader.vision, reader.pixels, size)
    assert each * len(pictures) <= config.num_cached_image_tokens < each * (len(pictures) + 1)
    # No picture becomes more tokens than that.
    sizes = [(height, width) for height in range(2, 130, 9) for width in range(2, 130, 9)]
    assert max(num_image_tokens(reader.vision, reader.pixels, one) for one in sizes) <= each
    assert len(largest_pictures(dataclasses.replace(config, max_num_encoder_tokens=1))) == 1
