"""Grammar-aligned decoding: samples whose law tends to the model's own law, given that the text is in the grammar.

Source: Park et al., "Grammar-Aligned Decoding" (2405.21047), section 4: ASAp, adaptive sampling with approximate
expected futures. Masking alone over-samples beginnings that are likely but that hardly any text of the grammar goes on
from. ASAp keeps a trie of all that it has sampled, with the model's probabilities P(token | text), and for each text u
an upper bound c(u) of the probability that the model, going on from u, ends inside the grammar:

    c(u) = sum over allowed tokens t of P(t | u) c(ut),    c = 1 for what has never been visited

A token is drawn in proportion to P(t | u) c(ut). Bounds only fall, and tend to the true probabilities where sampling
goes on, so that the law of samples tends to the model's law given the grammar. The first sample has the law of plain
constrained decoding.

Deviations: texts are those that end with a stop token within the room for new tokens, and everything else counts as
outside the grammar (in the released code a text that is cut off counts as inside). Bounds are brought up to date once
per sample, from its last token up to the root. Where a text comes again, the trie answers in place of the model.

    sampler = GrammarAligned(model, params, prompt, grammar, stop_tokens=tokenizer.stop_ids)
    samples = sampler.samples(200, rng=0)

Axis letters: V vocabulary, W words of a bitmask, M allowed tokens.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decoding.arguments import whole_number
from decoding.grammar.bitmask import num_words
from decoding.grammar.grammar import Grammar
from decoding.grammar.matcher import GrammarMatcher
from decoding.prefill import pad_prompts, prefill
from models.cache import KVCache, commit
from models.decoder import Decoder
from models.errors import InputError

KEPT = 4096  # allowed tokens up to which a node keeps its row, 48 KB; wider rows are asked for again


class Sample(NamedTuple):
    """A sample: its tokens, stop token included; whether it is in the grammar; laws that the model was asked for."""

    tokens: list[int]
    accepted: bool
    calls: int


class Node:
    """A text that has been sampled.

    Attributes:
        bound: c, at least the probability that the model goes on inside the grammar.
        children: by token, those that have been visited.
        tokens: i32[M], what may come next; None until the node is visited, or where there are too many to keep.
        law: f64[M], their probabilities by the model.
    """

    __slots__ = ("bound", "children", "law", "tokens")

    def __init__(self) -> None:
        """A text that is taken to stay inside."""
        self.bound, self.children, self.tokens, self.law = 1.0, {}, None, None


class Trie:
    """All that was sampled behind one prompt, by one model at one temperature, in one grammar."""

    def __init__(
        self, matcher: GrammarMatcher, law: Callable[[list[int]], np.ndarray], stops: Sequence[int], room: int
    ):
        """Starts empty.

        Args:
            matcher: the grammar; the trie has it for itself.
            law: new tokens -> f[V], the model's probabilities of the next one.
            stops: ids that end a text; at least one.
            room: new tokens of a text at most, the stop token among them.
        """
        self.matcher, self.law, self.stops, self.room = matcher, law, frozenset(stops), room
        self.root = Node()

    def sample(self, rng: np.random.Generator) -> Sample:
        """Draws a text and learns from it."""
        self.matcher.reset()
        path, text, calls, accepted = [self.root], [], 0, False
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        while len(text) < self.room and not accepted:
            node = path[-1]
            calls += node.tokens is None
            rows.append(self.row(node, text))
            weights = self.weights(node, *rows[-1])
            if not weights.sum() > 0:
                break
            token = int(rows[-1][0][_draw(weights, rng)])
            accepted = token in self.stops
            text.append(token)
            path.append(node.children.setdefault(token, Node()))
            if not accepted:
                self.matcher.consume(token)
        if not accepted:
            path[-1].bound = 0.0
        self._learn(path, rows)
        return Sample(text, accepted, calls)

    def weights(self, node: Node, tokens: np.ndarray, law: np.ndarray) -> np.ndarray:
        """Returns f64[M]: P(t | u) c(ut) of the tokens that may come behind a node's text."""
        weights = law.copy()
        if node.children:
            visited = np.fromiter(node.children, np.int64, len(node.children))
            bounds = np.array([child.bound for child in node.children.values()])
            weights[np.searchsorted(tokens, visited)] *= bounds
        return weights

    def row(self, node: Node, text: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (i32[M] tokens, f64[M] law) behind a node's text; the matcher stands there."""
        if node.tokens is not None:
            return node.tokens, node.law
        law = np.asarray(self.law(text), np.float64)
        words = np.zeros(num_words(len(law)), np.uint32)
        ends = self.matcher.fill(words)
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(law)].astype(bool)
        allowed[list(self.stops)] = ends
        tokens = np.flatnonzero(allowed).astype(np.int32)
        if len(tokens) <= KEPT:
            node.tokens, node.law = tokens, law[tokens]
        return tokens, law[tokens]

    def _learn(self, path: list[Node], rows: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Brings the bounds of a sample's nodes up to date, the last first."""
        for node, row in zip(path[: len(rows)][::-1], rows[::-1], strict=True):
            node.bound = float(self.weights(node, *row).sum())


def _draw(weights: np.ndarray, rng: np.random.Generator) -> int:
    """Returns an index with chances in proportion to weights f64[M]; never one of weight 0."""
    ends = np.cumsum(weights)
    index = int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))
    return index if index < len(weights) and weights[index] > 0 else int(np.flatnonzero(weights)[-1])


@functools.partial(jax.jit, static_argnums=0)
def _next_law(model: Decoder, params: Any, token: jax.Array, cache: KVCache, temperature: jax.Array) -> Any:
    """Reads one token, i32[]; returns (f32[V] probabilities of the next one, the cache with the token in it)."""
    output = model.apply({"params": params}, token[None, None], cache=cache)
    law = jax.nn.softmax(output.logits[0, 0].astype(jnp.float32) / temperature)
    return law, commit(output.cache, None, jnp.ones(1, jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _read(model: Decoder, params: Any, prompts: Any, slots: int) -> KVCache:
    return prefill(model, params, prompts, slots)


class ModelLaw:
    """A model's laws behind one prompt, with one cache that follows the texts it is asked about."""

    def __init__(self, model: Decoder, params: Any, prompt: Sequence[int], room: int, temperature: float):
        """Reads the prompt."""
        prompts = pad_prompts([list(prompt)], model.config.vocab_size)
        self.model, self.params, self.temperature = model, params, np.float32(temperature)
        self.base = int(prompts.lengths[0]) - 1
        if self.base + room > model.config.max_length:
            raise InputError(
                f"prompt and new tokens come to {self.base + 1 + room} tokens, the model's context is "
                f"{model.config.max_length}: shorten the prompt, or lower max_new_tokens"
            )
        self.cache = _read(model, params, prompts, prompts.tokens.shape[1] + room)
        self.last, self.text = int(prompt[-1]), []  # what the cache holds behind the prompt, but for its last token
        self.law: np.ndarray | None = None

    def __call__(self, text: list[int]) -> np.ndarray:
        """Returns f32[V], the probabilities of the token behind new tokens; reads those that the cache has not."""
        wanted = [self.last, *text]
        shared = next((i for i, (a, b) in enumerate(zip(self.text, wanted, strict=False)) if a != b), None)
        shared = min(len(self.text), len(wanted) - 1) if shared is None else min(shared, len(wanted) - 1)
        cache = self.cache.replace(length=np.array([self.base + shared], np.int32))
        for token in wanted[shared:]:
            law, cache = _next_law(self.model, self.params, np.int32(token), cache, self.temperature)
        self.cache, self.text = cache, wanted
        return np.asarray(law)


class GrammarAligned:
    """Samples of one prompt in one grammar; the trie grows from sample to sample."""

    def __init__(
        self,
        model: Decoder,
        params: Any,
        prompt: Sequence[int],
        grammar: Grammar,
        *,
        stop_tokens: Sequence[int],
        max_new_tokens: int = 128,
        temperature: float = 1.0,
    ):
        """Reads the prompt.

        Args:
            model: the network.
            params: its parameters.
            prompt: token ids, at least one.
            grammar: what texts may be.
            stop_tokens: ids that end a text.
            max_new_tokens: tokens of a text at most, stop token included; longer texts count as outside the grammar.
            temperature: above 0; part of the law that samples tend to.

        Raises:
            InputError: no stop token, a grammar for another vocabulary, or a size or temperature out of range.
        """
        room = whole_number("max_new_tokens", max_new_tokens)
        if room < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {room}")
        if not 0 < temperature < float("inf"):
            raise InputError(f"temperature must be above 0 and finite, got {temperature}")
        if not stop_tokens:
            raise InputError("a grammar's text ends with a stop token: pass stop_tokens=tokenizer.stop_ids")
        if not 0 <= min(stop_tokens) <= max(stop_tokens) < model.config.vocab_size:
            most = model.config.vocab_size - 1
            raise InputError(f"stop_tokens {list(stop_tokens)} must be ids of the model, 0 to {most}")
        if grammar.vocabulary.size != model.config.vocab_size:
            raise InputError(
                f"the grammar was made for {grammar.vocabulary.size} tokens, the model has {model.config.vocab_size}: "
                "make its vocabulary with Vocabulary.of(tokenizer, model.config.vocab_size)"
            )
        law = ModelLaw(model, params, prompt, room, temperature)
        self.trie = Trie(grammar.matcher(), law, stop_tokens, room)

    def samples(self, count: int, rng: int = 0) -> list[Sample]:
        """Returns `count` samples, in the order drawn; `rng` is their seed.

        Samples that are not `accepted` have met a dead end or the limit of tokens; leave them out, and the others have
        the law that this module tells of.
        """
        generator = np.random.default_rng(rng)
        return [self.trie.sample(generator) for _ in range(count)]
