"""What chosen neurons save and cost: the measurements of `experiments.bench_core_infer`.

Axis letters: I input features, O output features, N new tokens.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding import make_decode_fn
from decoding.method import with_kernels
from decoding.prefill import Observer, Prompts, observed_prefill, pad_prompts
from decoding.sparse.core_infer import CoreInferOptions, chosen_neurons, sliced, sparse_layers, strongest, vote_observer
from experiments.timed import TimedDecode, alternate
from models.cache import KVCache
from models.decoder import Decoder
from models.kernels import as_kernel
from models.layers import MLP

# What each choice ranks: whose votes, and how (the method's option `choose`).
_RANKED = {
    "core": ("core", "core"),
    "absolute": ("absolute", "absolute"),
    "magnitude": ("absolute", "magnitude"),
    "static": ("static_core", "core"),
    "static_magnitude": ("static_absolute", "magnitude"),
    "random": ("core", "random"),
}


@struct.dataclass
class LargestInputs:
    """A kernel [I, O] that sees the `count` largest inputs of each token alone, by their magnitude; static count."""

    base: Any
    count: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(I, O)."""
        return as_kernel(self.base).shape

    def dot(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """Maps x [B, T, I] to [B, T, O]."""
        kept = strongest(jnp.abs(x), jnp.full((x.shape[0],), self.count))
        return as_kernel(self.base).dot(jnp.where(kept, x, 0), dtype)

    def materialize(self) -> jax.Array:
        """Returns the base's matrix."""
        return as_kernel(self.base).materialize()


class Costs:
    """Reads continuations with the whole model and with chosen neurons."""

    def __init__(self, model: Decoder, params: Any, alpha: float, room: int):
        """Takes the share of activations that vote, and the most new tokens, N."""
        self.model, self.params, self.room = model, params, room
        self.layers = sparse_layers(model.config, CoreInferOptions())
        names = ("core", "absolute")
        parts = [vote_observer(model.config, CoreInferOptions(alpha=alpha, choose=name)) for name in names]

        def add(seen: Mapping[str, Any], inner: Sequence[jax.Array], real: jax.Array) -> dict[str, Any]:
            return {name: part.add(seen[name], inner, real) for name, part in zip(names, parts, strict=True)}

        observer = Observer(
            lambda prompts: {name: part.first(prompts) for name, part in zip(names, parts, strict=True)}, add
        )

        def read(params: Any, prompts: Prompts) -> tuple[KVCache, dict[str, Any]]:
            return observed_prefill(model, params, prompts, prompts.tokens.shape[1] + room, observer=observer)

        def score(params: Any, cache: KVCache, tokens: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = model.apply({"params": params}, tokens, cache=cache).logits
            chances = jnp.take_along_axis(jax.nn.log_softmax(logits), text[:, :, None], axis=2)
            return -chances[0, :, 0], logits[0].argmax(axis=1) == text[0]

        self._read, self._score = jax.jit(read), jax.jit(score)

    def read(self, prompt: Sequence[int]) -> tuple[KVCache, dict[str, Any]]:
        """Returns the cache behind a prompt, and its votes by `core` and by `absolute`."""
        return self._read(self.params, pad_prompts([prompt], self.model.config.vocab_size))

    def votes(self, prompts: Sequence[Sequence[int]]) -> Any:
        """Returns the votes of several prompts together, as those of one, under the names of static ones."""
        votes = (self.read(prompt)[1] for prompt in prompts)
        total = functools.reduce(lambda total, new: jax.tree.map(jnp.add, total, new), votes)
        return {f"static_{name}": part for name, part in total.items()}

    def kernels(self, choose: str, beta: float, votes: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the weights that a way to choose keeps; `votes` by whose they are, as in `_RANKED`."""
        if choose != "oracle":
            source, ranks = _RANKED[choose]
            neurons = chosen_neurons(votes[source], CoreInferOptions(beta=beta, choose=ranks))
            return sliced(self.params, self.layers, neurons)
        downs = {name: self.params[name]["mlp"]["down"]["kernel"] for name in (f"layers_{i}" for i in self.layers)}
        parts = {name: LargestInputs(down, int(beta * as_kernel(down).shape[0])) for name, down in downs.items()}
        return {name: {"mlp": {"down": {"kernel": part}}} for name, part in parts.items()}

    def score(self, kernels: Any, cache: KVCache, prompt: Sequence[int], text: Sequence[int]) -> np.ndarray:
        """Returns f64[2, n] for a text of n tokens behind a prompt: negative log-likelihoods, and 1 for each token that
        the model with these kernels (None: the whole model) would have written itself.
        """
        padded = [*text, *[0] * (self.room - len(text))]
        tokens, wanted = (np.asarray([row], np.int32) for row in ([prompt[-1], *padded[:-1]], padded))
        found = self._score(with_kernels(self.params, kernels), cache, tokens, wanted)
        return np.stack([np.asarray(row, np.float64)[: len(text)] for row in found])


def mlp_ratio(model: Decoder, params: Any, kernels: Any, layers: Sequence[int], repeats: int) -> float:
    """Returns the time of the MLPs of some layers for one token, with kernels over that with the model's own."""

    @jax.jit
    def run(params: Any, x: jax.Array) -> jax.Array:
        for layer in layers:
            mlp = MLP(model.config.blocks[layer].mlp)
            x = x + mlp.apply({"params": params[f"layers_{layer}"]["mlp"]}, x)
        return x

    x = jnp.ones((1, 1, model.config.width), params["embedding"]["embedding"].dtype)

    def side(params: Any) -> Callable[[], float]:
        def timed() -> float:
            begin = time.perf_counter()
            jax.block_until_ready([run(params, x) for _ in range(5)])
            return time.perf_counter() - begin

        return timed

    whole, small = alternate([side(params), side(with_kernels(params, kernels))], repeats)
    return statistics.median(small) / statistics.median(whole)


def step_ratio(
    model: Decoder, params: Any, prompt: list[int], options: Mapping[str, Any], new_tokens: int, repeats: int
) -> float:
    """Returns the time of decoding with core neurons over that of the same code without, the prompt not counted."""
    sides = []
    for method, more, sampling in (("sample", {}, {"temperature": 0.0}), ("core_infer", options, {})):
        decode_fn = make_decode_fn(model, method, max_new_tokens=new_tokens, **more)
        timed, inputs = TimedDecode(decode_fn, params), decode_fn.inputs([prompt], **sampling)
        sides.append(lambda timed=timed, inputs=inputs: timed(inputs)[1].decode)
    whole, small = alternate(sides, repeats)
    return statistics.median(small) / statistics.median(whole)
