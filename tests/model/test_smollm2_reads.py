"""SmolLM2-135M in fp32: prompt log-probabilities and vectors are those of transformers."""

import numpy as np
import pytest
import torch
from prompts import PROMPTS

from octavo import SamplingParams

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def prompts(llm):
    encoded = [llm.get_tokenizer().encode(text) for text in PROMPTS]
    return [{"prompt_token_ids": ids} for ids in encoded if len(ids) < 200][:4]


@torch.inference_mode()
def test_prompt_logprobs(reference, llm, prompts):
    sampling = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=2)
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        ids = torch.tensor([output.prompt_token_ids])
        expected = reference(ids).logits[0, :-1].log_softmax(-1)
        chosen = expected.gather(1, ids[0, 1:, None]).squeeze(1)
        scores = output.prompt_logprobs[1:]
        found = torch.tensor([score.logprob for score in scores])
        torch.testing.assert_close(found, chosen, rtol=0, atol=1e-4)
        top = torch.tensor([[value for _, value in score.top] for score in scores])
        torch.testing.assert_close(top, expected.topk(2).values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@torch.inference_mode()
def test_vectors(reference, llm, prompts, pooling):
    for output in llm.embed(prompts, pooling, use_tqdm=False):
        ids = torch.tensor([output.prompt_token_ids])
        states = reference.model(ids).last_hidden_state[0]
        vector = (states[-1] if pooling == "last" else states.mean(0)).numpy()
        vector /= np.linalg.norm(vector)
        assert output.outputs.embedding @ vector > 0.9999
        np.testing.assert_allclose(output.outputs.embedding, vector, rtol=0, atol=1e-4)
