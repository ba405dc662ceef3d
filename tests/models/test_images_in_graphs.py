"""Requests with images where steps are replayed, on a CPU: which steps are, and what they answer.

The work is run again in place of a replay. What a real CUDA graph adds is tested on a GPU.
"""

from itertools import pairwise

import pytest
from models.test_images import CAR, CAT, DOG, NUM_TOKENS, create_llm, prompt, tokens
from runner.test_graphs import RunAgain

from octavo.engine import build
from octavo.runner import ModelRunner
from octavo.runner.graphs import StepGraphs
from octavo.testing.tiny_models import write_tiny_model

ANSWERED = [prompt(5, CAT, 9), prompt(33, CAT, 1, DOG, 2, CAT, 20, CAR, 3), prompt(20), prompt(DOG)]


@pytest.fixture(scope="module", params=["llava", "blip2", "qwen2_5_vl"])
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / request.param
    write_tiny_model(directory, request.param)
    return directory


@pytest.fixture(scope="module")
def expected(model):
    return tokens(create_llm(model), ANSWERED)


@pytest.fixture
def passes(monkeypatch):
    """Have engines replay, and note each step in order: ("decode" or "mixed") or "no graph"."""
    made, allocate, launch, replay = (
        build.create_runner,
        build.allocate_kv_caches,
        ModelRunner.launch,
        StepGraphs.run_model,
    )
    noted = []

    def create_runner(*args):
        runner = made(*args)
        runner.capture_graphs(lambda: RunAgain)
        return runner

    def with_a_block_of_nobody(specs, *, num_blocks, **rest):
        return allocate(specs, num_blocks=num_blocks + 1, **rest)

    def noting_launch(self, plan):
        if plan.scheduled:
            noted.append("no graph")
        return launch(self, plan)

    def noting_replay(self, shape):
        noted[-1] = "decode" if shape.is_decode else "mixed"
        return replay(self, shape)

    monkeypatch.setattr(build, "create_runner", create_runner)
    monkeypatch.setattr(build, "allocate_kv_caches", with_a_block_of_nobody)
    monkeypatch.setattr(ModelRunner, "launch", noting_launch)
    monkeypatch.setattr(StepGraphs, "run_model", noting_replay)
    return noted


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_all_steps_but_those_that_add_rows_of_images_are_replayed(
    model, expected, passes, async_scheduling
):
    llm = create_llm(model, max_num_seqs=1, async_scheduling=async_scheduling)
    for one, answer in zip(ANSWERED, expected, strict=True):
        passes.clear()
        assert tokens(llm, [one]) == [answer]
        first = "no graph" if "multi_modal_data" in one else "mixed"
        assert passes == [first] + ["decode"] * (NUM_TOKENS - 1)


def test_decodes_behind_images_and_texts_share_graphs_with_chunks_of_prompts(
    model, expected, passes
):
    llm = create_llm(model, max_num_seqs=3, max_num_batched_tokens=13)
    assert tokens(llm, ANSWERED) == expected
    assert set(passes) == {"no graph", "mixed", "decode"}
    assert any(pair == ("no graph", "mixed") for pair in pairwise(passes))


def test_a_row_that_had_an_image_is_given_to_a_text(model, expected, passes):
    """And back: nothing of who was there before moves anybody's positions."""
    llm = create_llm(model, max_num_seqs=1)
    for index in (0, 2, 3, 2, 1):
        assert tokens(llm, [ANSWERED[index]]) == [expected[index]]
