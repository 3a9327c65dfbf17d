"""Trained heads that draft from the target's own hidden states: what each must say of itself, and the steps of those
that guess all offsets at once.

The target's pass over a tree leaves its residual streams; those of the last kept row are what a head reads when it
drafts next. The first step of a call has none yet and is a plain one: a pass over one row costs the same whether it
emits a token or only reads the prompt's last one again. What a head returns is read by the target's own unembedding, so
that heads hold no matrix of the vocabulary's size.

Axis letters: B batch, T tokens of a row, D model width, K offsets, R ranks, W tree rows, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from decoding.method import Call, Steps, WithDraft
from decoding.prefill import Prompts
from decoding.sampling import top_tokens
from decoding.speculative.drafter import Drafter, Round, Seen
from decoding.speculative.head_trees import (
    Accuracy,
    StateTrees,
    calibrated_tree,
    check_accuracy,
    one_tree,
    usual_accuracy,
)
from decoding.speculative.loop import make_speculative
from decoding.speculative.sizing import LatencyCurve, check_latency
from decoding.speculative.tree import Template, TokenTree
from decoding.speculative.typical import typical
from decoding.speculative.verify import Mode
from models.decoder import Decoder
from models.errors import InputError, unknown_name


class Reading(NamedTuple):
    """Packed texts as a head sees them in training.

    Attributes:
        tokens: i32[B, T]; so are the next two.
        positions: a token's place in its text.
        segments: which text of the row a token belongs to, from 1 on; 0 is padding.
        hidden: {i: [B, T, D]}, the target's residual streams by the index of the layer they enter.
        places: i32[B, M], the tokens that guesses are wanted from, -1 for none; None: all T.
    """

    tokens: jax.Array
    positions: jax.Array
    segments: jax.Array
    hidden: dict[int, jax.Array]
    places: jax.Array | None = None

    def at_places(self, x: jax.Array) -> jax.Array:
        """Returns what stands at the places, [B, M, ...], of [B, T, ...]."""
        if self.places is None:
            return x
        return jnp.take_along_axis(
            x, jnp.maximum(self.places, 0).reshape(*self.places.shape, *(1,) * (x.ndim - 2)), axis=1
        )


class HeadKind(NamedTuple):
    """A kind of head, to whoever trains it. The target (model, params) is only ever read.

    Attributes:
        config: frozen dataclass of its settings; `type` is its name, `offsets` is K.
        streams: (config, model) -> the residual streams that it reads.
        init: (config, model, params, key) -> its values at the start.
        guesses: (config, model, params, values, reading) -> [B, T, K, D]; entry [b, t, k] is what the target's
            unembedding (`Decoder.scores`) turns into guesses of token t + 2 + k, token t + 1 being known.
        some: whether it makes those of the reading's places alone, [B, M, K, D].
        trees: (config, accuracy, nodes) -> the trees that it drafts with.
    """

    config: type
    streams: Callable[[Any, Decoder], tuple[int, ...]]
    init: Callable[[Any, Decoder, Any, jax.Array], Any]
    guesses: Callable[[Any, Decoder, Any, Any, Reading], jax.Array]
    some: bool = False
    trees: Callable[[Any, Accuracy, int], StateTrees] = one_tree


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """What every method with a head can be told. With a head's file (`--head`) its settings and accuracy come from it.

    Attributes:
        head: the head's settings.
        nodes: guesses of the tree, row 0 apart.
        offsets: depth of the tree at most; None: as many as the head has.
        accuracy: how often the head is right, by offset and rank (`decoding.speculative.head_trees`); None: a guess.
        latency: what passes cost here (`decoding.speculative.sizing`): only guesses that pay are kept.
        acceptance: `typical` keeps what the target finds likely enough (`decoding.speculative.typical`): then the
            method is lossy.
        epsilon: the most that typical acceptance asks of a probability.
    """

    head: Any = None
    nodes: int = 16
    offsets: int | None = None
    accuracy: Accuracy | None = None
    latency: LatencyCurve | None = None
    acceptance: Literal["exact", "typical"] = "exact"
    epsilon: float = 0.09

    def __post_init__(self) -> None:
        check_latency(self.latency)
        if self.acceptance not in ("exact", "typical"):
            raise unknown_name("acceptance", self.acceptance, ("exact", "typical"))
        if not 0 < self.epsilon < 1:
            raise InputError(f"epsilon is a probability between 0 and 1, got {self.epsilon}: the paper's is 0.09")
        if self.acceptance == "exact" and self.epsilon != HeadOptions.epsilon:
            raise InputError("epsilon belongs to typical acceptance: leave it out, or set acceptance to typical")
        known = next(field.default for field in dataclasses.fields(self) if field.name == "head")
        if not isinstance(self.head, type(known)):
            raise InputError(f"head must be a {type(known).__name__}, the settings of a head; got {self.head!r:.80}")
        if self.nodes < 1:
            raise InputError(f"nodes must be at least 1, got {self.nodes}")
        if self.offsets is not None and not 1 <= self.offsets <= self.head.offsets:
            raise InputError(f"the head has {self.head.offsets} offsets: offsets must be 1 to that, got {self.offsets}")
        if self.accuracy is not None:
            object.__setattr__(self, "accuracy", tuple(tuple(row) for row in self.accuracy))
            check_accuracy(self.accuracy)
            if len(self.accuracy) < self.depth:
                raise InputError(
                    f"accuracy covers {len(self.accuracy)} offsets, but the tree may be {self.depth} deep: calibrate "
                    f"the head again, or set offsets to {len(self.accuracy)}"
                )

    @property
    def depth(self) -> int:
        """Offsets that are drafted."""
        return self.head.offsets if self.offsets is None else self.offsets

    @property
    def lossy(self) -> bool:
        """Whether texts are neither greedy ones nor of the target's law."""
        return self.acceptance == "typical"

    @property
    def mode(self) -> Mode:
        """How trees are verified."""
        return typical(self.epsilon) if self.lossy else "node"

    def template(self, vocab: int) -> Template:
        """Returns the static tree, for a model of so many tokens."""
        accuracy = usual_accuracy(self.depth) if self.accuracy is None else self.accuracy[: self.depth]
        return calibrated_tree([row[:vocab] for row in accuracy], self.nodes, self.latency)[0]


def normed(model: Decoder, params: Any, x: jax.Array) -> jax.Array:
    """Returns the last residual stream [..., D] as the unembedding reads it, in float32."""
    return model.apply({"params": params}, x, method="normed").astype(jnp.float32)


def scores(model: Decoder, params: Any, y: jax.Array) -> jax.Array:
    """Returns the target's logits f32[..., V] of what its unembedding reads, [..., D]."""
    return model.apply({"params": params}, y.astype(params["embedding"]["embedding"].dtype), method="scores")


def check_values(kind: HeadKind, config: Any, model: Decoder, params: WithDraft) -> None:
    """Raises InputError where a head's values are not those of its settings on this model."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    fresh = jax.eval_shape(lambda params, key: kind.init(config, model, params, key), params.target, key)
    wanted, found = (jax.tree.map(jnp.shape, tree) for tree in (fresh, params.draft))
    if wanted != found:
        raise InputError(
            f"the head's values do not fit its settings {config} and a model of width {model.config.width}: wanted "
            f"{wanted!s:.300}, got {found!s:.300}"
        )


@struct.dataclass
class HeadState:
    """What a head keeps between steps: the streams [B, D] of each row's last kept token, and bool[B], whether there is
    one yet.
    """

    kept: dict[int, jax.Array]
    ready: jax.Array


def kept_row(seen: Seen, streams: dict[int, jax.Array]) -> dict[int, jax.Array]:
    """Returns [B, D] each: the streams [B, W, D] of the last row of the accepted path."""
    row = jnp.take_along_axis(seen.verified.rows, seen.verified.count[:, None] - 1, axis=1)
    return jax.tree.map(lambda x: jnp.take_along_axis(x, row[..., None], axis=1)[:, 0], streams)


def hung(template: Template, best: jax.Array, round_: Round, ready: jax.Array) -> TokenTree:
    """Returns the tree whose row at depth k + 1 and rank r is guess [k, r].

    Args:
        template: its shape.
        best: i32[B, K, R], each offset's likeliest tokens.
        round_: the newest token.
        ready: bool[B]; the other rows get a tree of the newest token alone.
    """
    rank, depth = template.rank[1:], template.depth[1:]
    tokens = jnp.concatenate([round_.last[:, None], best[:, depth - 1, rank]], axis=1)
    tree = template.tree(tokens)
    return tree.replace(parent=jnp.where(ready[:, None], tree.parent, -1))


Guess = Callable[[WithDraft, dict[int, jax.Array], Round, int], jax.Array]


def make_parallel(
    kind: HeadKind, model: Decoder, options: HeadOptions, stop_tokens: tuple[int, ...], guess: Guess
) -> Steps:
    """Returns the steps of a head that guesses all offsets at once, from the last kept row's streams.

    Args:
        kind: of the head.
        model: the target.
        options: head and tree.
        stop_tokens: ids that end a row.
        guess: (params, {i: [B, D]}, round, depth) -> [B, depth, D], the first offsets of what `HeadKind.guesses` has.
    """
    template = options.template(model.config.vocab_size)
    streams = kind.streams(options.head, model)
    ranks = int(template.rank.max()) + 1

    def init(params: WithDraft, prompts: Prompts, slots: int, call: Call) -> HeadState:
        check_values(kind, options.head, model, params)
        dtype = params.target["embedding"]["embedding"].dtype
        none = jnp.zeros((len(prompts.lengths), model.config.width), dtype)
        return HeadState(dict.fromkeys(streams, none), jnp.zeros(prompts.lengths.shape, bool))

    def propose(params: WithDraft, state: HeadState, round_: Round):
        guesses = guess(params, state.kept, round_, template.max_depth)
        best = top_tokens(scores(model, params.target, guesses), ranks)
        drafted = jnp.where(state.ready, template.width - 1, 0)
        return hung(template, best, round_, state.ready), state, drafted, state.ready.astype(jnp.int32)

    def plain(params: WithDraft, state: HeadState, round_: Round):
        none = jnp.zeros_like(round_.last)
        return template.tree(round_.last[:, None]), state, none, none

    def observe(params: WithDraft, state: HeadState, seen: Seen) -> HeadState:
        return HeadState(kept_row(seen, seen.digest), jnp.ones_like(state.ready))

    drafter = Drafter(
        template.width,
        template.max_depth + 1,
        options.mode,
        init,
        propose if template.max_depth else plain,
        observe,
        smaller=(1,) if template.max_depth else (),
        digest=lambda logits, hidden: hidden,
        collect=streams,
    )
    return make_speculative(model, drafter, stop_tokens)
