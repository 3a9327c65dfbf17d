"""What a user may get wrong: every mistake is an InputError that names the value and what to type instead."""

import jax
import numpy as np
import pytest

from decoding import make_decode_fn
from models.errors import InputError

MAKE = [
    ({"method": "gredy"}, r"unknown method 'gredy'\. Did you mean 'greedy'\?"),
    ({"method": "smaple"}, r"Did you mean 'sample'\?"),
    ({"method": "zzz"}, r"Known: .*greedy"),
    ({"temperature": 1.0}, r"unknown option of method 'greedy' 'temperature'"),
    ({"max_new_tokens": 0}, r"max_new_tokens must be at least 1.*got 0"),
    ({"max_new_tokens": -3}, r"got -3"),
    ({"max_new_tokens": "8"}, r"max_new_tokens.*'8'"),
    ({"max_new_tokens": 8.5}, r"max_new_tokens.*8\.5"),
    ({"cache_slots": 0}, r"cache_slots must be at least 1, got 0"),
    ({"cache_slots": "20"}, r"cache_slots.*'20'"),
    ({"stop_tokens": 5}, r"stop_tokens.*5"),
    ({"stop_tokens": ["</s>"]}, r"stop_tokens.*</s>"),
    ({"stop_tokens": [3, 61]}, r"stop_tokens \[3, 61\] must be ids of the model, 0 to 60"),
    ({"stop_tokens": [-1]}, r"stop_tokens \[-1\] must be"),
    ({"method": "contrastive", "k": 2.5}, r"k must be a whole number, got 2\.5"),
    ({"method": "prompt_lookup", "length": "7"}, r"length must be a whole number, got '7'"),
    ({"method": "ppd", "pruning": "randm"}, r"unknown pruning 'randm'\. Did you mean 'random'"),
    ({"method": "medusa", "epsilon": 0.2}, "epsilon belongs to typical acceptance"),
]

CALL = [
    ({"temprature": 1.0}, r"unknown sampling setting 'temprature'\. Did you mean 'temperature'\?"),
    ({"topp": 0.5}, r"Did you mean 'top_p'\?"),
    ({"temperature": -0.5}, r"temperature must be >= 0.*got -0\.5"),
    ({"temperature": float("nan")}, r"temperature.*nan"),
    ({"temperature": float("inf")}, r"temperature.*inf"),
    ({"temperature": 1e39}, r"temperature.*1e\+39"),
    ({"temperature": [0.5, -1.0]}, r"temperature must be >= 0.*got \[0\.5, -1\.0\]"),
    ({"top_k": -1}, r"top_k must be >= 0.*got -1"),
    ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0"),
    ({"top_p": 1.5}, r"top_p.*got 1\.5"),
    ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0\.1"),
    ({"min_p": 1.1}, r"min_p.*1\.1"),
    ({"repetition_penalty": 0}, r"repetition_penalty must be .*got 0"),
    ({"repetition_penalty": 1e-50}, r"repetition_penalty.*1e-50"),
    ({"repetition_penalty": float("inf")}, r"repetition_penalty.*inf"),
    ({"top_k": 2.0}, r"top_k must be a whole number, got 2\.0"),
    ({"temperature": "hot"}, r"temperature must be a number, got 'hot'"),
    ({"temperature": None}, r"temperature must be a number, got None"),
    ({"temperature": True}, r"temperature must be a number, got True"),
    ({"temperature": [1.0, 1.0, 1.0]}, r"temperature must be one number or one per row \(2\)"),
    ({"temperature": [[1.0, 1.0]]}, r"temperature must be one number or one per row \(2\)"),
    ({"temperature": [1.0, [1.0, 2.0]]}, r"temperature must be"),
    ({"max_new_tokens": [1, 2, 3]}, r"max_new_tokens must be one number or one per row \(2\)"),
    ({"max_new_tokens": 9}, r"max_new_tokens must be 0 to 8, got 9; .*make_decode_fn"),
    ({"max_new_tokens": [1, 9]}, r"max_new_tokens must be 0 to 8, got \[1, 9\]"),
    ({"max_new_tokens": -1}, r"max_new_tokens must be 0 to 8, got -1"),
    ({"max_new_tokens": 2**32}, r"max_new_tokens must be 0 to 8, got 4294967296"),
    ({"max_new_tokens": 2.5}, r"max_new_tokens must be a whole number, got 2\.5"),
    ({"rng": [1, 2, 3]}, r"rng must be .*per row"),
    ({"rng": [1]}, r"rng must be .*per row"),
    ({"rng": []}, r"rng must be"),
    ({"rng": [[1, 2]]}, r"rng must be"),
    ({"rng": 1.5}, r"rng must be.*1\.5"),
    ({"rng": [1, 2.5]}, r"rng must be.*2\.5"),
    ({"rng": None}, r"rng must be.*None"),
    ({"rng": "a"}, r"rng must be.*'a'"),
    ({"rng": 2**64}, r"rng must be"),
    ({"rng": jax.random.split(jax.random.key(0), 3)}, r"rng must be .*\(3,\) for 2 prompts"),
    ({"rng": jax.random.split(jax.random.key(0), (2, 1))}, r"rng must be .*\(2, 1\) for 2 prompts"),
]


@pytest.fixture(scope="module")
def sample(tiny):
    return make_decode_fn(tiny[0], "sample", max_new_tokens=8)


@pytest.mark.parametrize(("arguments", "words"), MAKE, ids=lambda value: str(value)[:40])
def test_wrong_arguments_of_make_decode_fn(tiny, arguments, words):
    with pytest.raises(InputError, match=words):
        make_decode_fn(tiny[0], **arguments)


@pytest.mark.parametrize(("arguments", "words"), CALL, ids=lambda value: str(value)[:40])
def test_wrong_arguments_of_a_call(sample, tiny, arguments, words):
    with pytest.raises(InputError, match=words):
        sample(tiny[1], [[1, 2], [3]], **arguments)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"])
def test_greedy_takes_no_sampling_setting(tiny, name):
    with pytest.raises(InputError, match=rf"method 'greedy' takes no {name}: use method='sample'"):
        make_decode_fn(tiny[0])(tiny[1], [[1]], **{name: 1})


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1 is empty"),
        ([[1], [99]], "token id 99, but the model has ids 0 to 60"),
        ([1, 2, 3], "list of token ids"),
        ("hello", "list of token ids"),
        ([[1] * 21], "longest prompt has 21 tokens, the cache 20 slots: raise cache_slots"),
    ],
    ids=str,
)
def test_wrong_prompts(tiny, prompts, words):
    with pytest.raises(InputError, match=words):
        make_decode_fn(tiny[0], cache_slots=20)(tiny[1], prompts)


def test_what_was_never_learned_is_no_start(tiny):
    with pytest.raises(InputError, match="warm must be the `warm` of an earlier output of method 'token_recycling'"):
        make_decode_fn(tiny[0], "token_recycling")(tiny[1], [[1]], warm="table.npz")


def test_a_cache_without_room_behind_a_shortened_draft_prompt(tiny):
    fn = make_decode_fn(tiny[0], "speculative_sampling", draft=tiny[0], max_new_tokens=60, cache_slots=100)
    fn.inputs([[1] * 33])
    with pytest.raises(InputError, match="draft_prompts need cache_slots .* beside these prompts, got 100"):
        fn.inputs([[1] * 33], draft_prompts=[[1] * 16])


def test_prompt_longer_than_the_models_context(tiny):
    with pytest.raises(InputError, match="longest prompt has 257 tokens, the model's context only 256"):
        make_decode_fn(tiny[0])(tiny[1], [[1], [1] * 257])


def test_top_k_beyond_32_bits_keeps_all(sample):
    assert sample.inputs([[1]], top_k=2**32 + 1)[1].sampling.top_k[0] > 61


def test_numbers_of_numpy_and_jax_are_numbers(sample):
    settings = {"temperature": np.float64(0.5), "top_k": np.int64(3), "min_p": jax.numpy.float32(0.1)}
    call = sample.inputs([[1], [2]], np.int64(3), max_new_tokens=np.int32(4), **settings)[1]
    assert call.limit.tolist() == [4, 4] and call.sampling.top_k.tolist() == [3, 3]
    assert call.sampling.temperature.dtype == np.float32
