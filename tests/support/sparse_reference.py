"""Slow, plain references for sparse attention: one row, one token and one head at a time, over keys kept in a list.

A *rule* says which earlier tokens each query head sees: `rule(layer, config, q, keys) -> bool[H, n]` for q f[H, Dh] of
the newest token and keys f[n, K, Dh], its own last. `start()` is called before each token.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from decoding.autoregressive import target_step
from decoding.method import Policy
from decoding.prefill import Prompts, pad_prompts, prefill
from decoding.state import init_state
from models.cache import KVCache
from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig, RopeConfig
from models.decoder import Decoder

VOCAB = 61


def deep_model(window_at: int | None = 3, num_layers: int = 5, **changes: Any) -> tuple[Decoder, Any]:
    """Returns (model, params) with grouped heads and, in one layer, a sliding window of 7; the text is varied."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(100.0), **changes)
    block = BlockConfig(attention, MLPConfig(48))
    local = dataclasses.replace(block, attention=dataclasses.replace(attention, window=7))
    blocks = tuple(local if index == window_at else block for index in range(num_layers))
    model = Decoder(DecoderConfig("llama", vocab_size=VOCAB, width=32, blocks=blocks, max_length=512))
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: x * 9.0 if x.ndim == 2 else x, params)


def kept_neurons(params: Any, kernels: Any) -> dict[str, np.ndarray]:
    """Returns, for each layer that `kernels` has an MLP for, which rows of the whole down projection it holds."""
    found = {}
    for name, layer in kernels.items():
        whole = np.asarray(params[name]["mlp"]["down"]["kernel"])
        part = np.asarray(layer["mlp"]["down"]["kernel"].w)
        found[name] = np.flatnonzero((whole[:, None] == part[None]).all(axis=2).any(axis=1))
    return found


class Rule:
    """Dense attention, in the model's own windows; policies override `choose`."""

    def start(self) -> None:
        """Forgets what belongs to the token before."""

    def __call__(self, layer: int, config: AttentionConfig, q: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Returns bool[H, n]."""
        newest = len(keys) - 1
        seen = np.ones((config.num_heads, len(keys)), bool)
        if config.window is not None:
            seen[:] = np.arange(len(keys)) > newest - config.window
            return seen
        return self.choose(layer, config, q, keys)

    def choose(self, layer: int, config: AttentionConfig, q: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Returns bool[H, n] for a layer without a window."""
        return np.ones((config.num_heads, len(keys)), bool)


class SlowRow:
    """A model that reads one row token by token and keeps the keys of each layer in a list."""

    def __init__(self, model: Decoder, params: Any):
        self.model, self.params = model, params
        self.keys = [[] for _ in model.config.blocks]
        self.values = [[] for _ in model.config.blocks]

    def read(self, tokens: list[int], rule: Rule) -> np.ndarray:
        """Returns the logits f[V] behind the last of some tokens, read under a rule."""
        _READING[:] = [self, rule]
        for token in tokens:
            rule.start()
            place = jnp.full((1, 1), len(self.keys[0]), jnp.int32)
            logits = np.asarray(_read_token(self.model, self.params, jnp.full((1, 1), token, jnp.int32), place))
        return logits

    def attend(self, rule: Rule, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Returns f[1, 1, H, Dh]; q, k and v are those of the newest token."""
        self.keys[layer].append(np.asarray(k[0, 0], np.float64))
        self.values[layer].append(np.asarray(v[0, 0], np.float64))
        config = self.model.config.blocks[layer].attention
        out = self._attention(np.asarray(q[0, 0], np.float64), layer, config, rule)
        return out[None, None].astype(q.dtype)

    def forget(self, count: int) -> None:
        """Drops the last tokens."""
        for stored in self.keys + self.values:
            del stored[len(stored) - count :]

    def _attention(self, q: np.ndarray, layer: int, config: AttentionConfig, rule: Rule) -> np.ndarray:
        keys, values = np.stack(self.keys[layer]), np.stack(self.values[layer])
        seen = rule(layer, config, q, keys)
        out = np.zeros_like(q)
        for head in range(config.num_heads):
            kv = head // (config.num_heads // config.num_kv_heads)
            scores = keys[:, kv] @ q[head] * (config.head_dim**-0.5 if config.scale is None else config.scale)
            if config.softcap is not None:
                scores = config.softcap * np.tanh(scores / config.softcap)
            weights = np.where(seen[head], np.exp(scores - scores[seen[head]].max()), 0.0)
            out[head] = weights / weights.sum() @ values[:, kv]
        return out


_READING: list = []  # the row and the rule that the compiled model below is to ask


@functools.partial(jax.jit, static_argnums=0)
def _read_token(model: Decoder, params: Any, token: jax.Array, position: jax.Array) -> jax.Array:
    """Returns the logits f[V] behind a token i32[1, 1]; attention is left to the row that reads."""

    def attend(q, k, v, cache, ctx, *, config, layer):
        def ask(q, k, v):
            row, rule = _READING
            return row.attend(rule, layer, q, k, v)

        return io_callback(ask, jax.ShapeDtypeStruct(q.shape, q.dtype), q, k, v, ordered=True), cache, ctx

    return model.apply({"params": params}, token, position, attend=attend).logits[0, 0]


def slow_logits(
    model: Decoder, params: Any, rule: Rule, prompt: list[int], text: list[int], every: int | None = None
) -> np.ndarray:
    """Returns f[n, V]: the logits before each of n new tokens, the prompt (but its last token) read densely.

    Args:
        model: the network.
        params: its parameters.
        rule: what a new token sees.
        prompt: one token at least.
        text: the new tokens.
        every: steps between two corrections of the cache.
    """
    row = SlowRow(model, params)
    if len(prompt) > 1:
        row.read(prompt[:-1], Rule())
    logits, recent = [], []
    for token in [prompt[-1], *text][: len(text)]:
        logits.append(row.read([token], rule))
        recent.append(token)
        if len(recent) == every:
            row.forget(every)
            row.read(recent, Rule())
            recent = []
    return np.stack(logits)


def fast_logits(
    model: Decoder, params: Any, policy: Policy, prompts: list[list[int]], texts: list[list[int]], slots: int = 96
) -> np.ndarray:
    """Returns f[B, n, V]: what a policy's steps give before each of n tokens that are forced on it.

    Slots that hold nothing are filled with garbage first.
    """
    padded, text = pad_prompts(prompts, VOCAB), np.asarray(texts, np.int32)
    last = np.array([prompt[-1] for prompt in prompts], np.int32)
    tokens = np.concatenate([last[:, None], text], axis=1)[:, :-1]
    cache = _prefilled(model, params, padded, slots)

    @jax.jit
    def run(params, cache, tokens):
        state = init_state(cache, tokens[:, 0], jnp.full((len(prompts),), 9), 9, 1, None)

        def step(carry, token):
            state, memory = carry
            logits, memory, state = target_step(model, params, state.replace(last=token), policy, memory)
            return (state, memory), logits

        return jax.lax.scan(step, (state, policy.init(cache)), tokens.T)[1]

    return np.swapaxes(np.asarray(run(params, cache, tokens)), 0, 1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _prefilled(model: Decoder, params: Any, prompts: Prompts, slots: int) -> KVCache:
    return with_garbage(prefill(model, params, prompts, slots))


def with_garbage(cache: KVCache) -> KVCache:
    """Returns the cache with large numbers in every slot behind the length."""
    dead = jnp.arange(cache.num_slots)[None, :] >= cache.length[:, None]
    noise = [1e3 * jax.random.normal(jax.random.key(index), x.shape, x.dtype) for index, x in enumerate(cache.k)]
    fill = lambda old, new: jnp.where(dead[:, None, :, None], new, old)  # noqa: E731
    k = tuple(fill(x, new) for x, new in zip(cache.k, noise, strict=True))
    return cache.replace(k=k, v=tuple(fill(x, new) for x, new in zip(cache.v, noise, strict=True)))
