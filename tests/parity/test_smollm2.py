"""SmolLM2-135M-Instruct from its GGUF file beside transformers on the same weights: 64 greedy tokens on 8 prompts."""

import numpy as np
import pytest
import torch

from decoding import make_decode_fn
from tests.golden.make_smollm2_greedy import NEW_TOKENS, PROMPTS, greedy, torch_model

TIE = 1e-3


@pytest.fixture(scope="module")
def theirs():
    return torch_model()


def test_greedy_tokens(smollm2, theirs):
    """Token-identical; a row may differ from the first place on where the two highest logits are closer than 1e-3."""
    encode = [smollm2.tokenizer.encode_chat, smollm2.tokenizer.encode]
    prompts = [encode[i % 2](text) for i, text in enumerate(PROMPTS)]
    stops = smollm2.tokenizer.stop_ids
    out = make_decode_fn(smollm2.model, max_new_tokens=NEW_TOKENS, stop_tokens=stops)(smollm2.params, prompts)
    for row, prompt in enumerate(prompts):
        expected, gaps = greedy(theirs, prompt, stops)
        ours = np.asarray(out.tokens[row, : int(out.lengths[row])]).tolist()
        if ours != expected:
            first = next(i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b)
            assert gaps[first] < TIE, f"prompt {row}, token {first}: {ours[first]} for {expected[first]}"


def test_logits(smollm2, theirs):
    prompt = smollm2.tokenizer.encode_chat(PROMPTS[-1])
    ours = smollm2.model.apply({"params": smollm2.params}, np.array([prompt], np.int32)).logits
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=2e-3, rtol=0)
