"""Parallel Prompt Decoding: a few trained embeddings behind the text, whose outputs guess the tokens to come.

Source: "Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference" (2405.18628),
sections 3.1 (prompt tokens, their copies), 3.2 and 3.3 (trees: `decoding.speculative.prompt_trees`) and 3.4 (training).
The i-th prompt token stands where the i-th token to come would, and the model's output there guesses the one behind it.
K * E * D numbers are trained, 1,728 for three prompt tokens on a model of width 576; the model is frozen.

    training   behind places of a text drawn at random: all prompt tokens, which see the text up to there and those
               before them; the loss is the distance to the model's own laws further on in its own text
    decoding   each row of the tree carries prompt tokens of its own, so that one pass verifies the guesses of the last
               step and makes those of the next, whichever path is accepted

Of E copies of a prompt token each sees its own kind alone, and their outputs are averaged.

Deviations. The mean of copies is taken of what the unembedding reads: that of the logits, as the released code has it
(the paper averages probabilities), but for models that cap their logits. The divergence is that of the prompt's law
from the model's (released code; the paper writes it the other way round). Labels are the text that the model wrote,
greedy or sampled, in place of a greedy continuation from each place. Prompt tokens start as embeddings of tokens drawn
from the first tenth of the vocabulary, where byte-pair tables have common pieces. Acceptance is exact unless
`acceptance: typical` is asked for, which the paper uses above temperature 0. The first step of a call is a plain one
that carries prompt tokens.

Axis letters: B batch, T tokens of a row, M places, K offsets, E copies, D model width, S states, W rows, R ranks.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.method import Call, Method, Steps, WithDraft
from decoding.prefill import Prompts
from decoding.sampling import top_tokens
from decoding.speculative.draft_head import HeadKind, HeadOptions, Reading, check_values, normed, scores
from decoding.speculative.drafter import Drafter, Round, Seen
from decoding.speculative.groups import Groups, Noted, noted_attend, noting_attend
from decoding.speculative.head_trees import Accuracy, StateTrees, usual_accuracy
from decoding.speculative.loop import make_speculative
from decoding.speculative.prompt_trees import Pruning, Trees, by_state, prompt_trees, sized_trees
from decoding.speculative.tree import TokenTree
from models.decoder import Decoder
from models.errors import InputError, unknown_name


@dataclasses.dataclass(frozen=True)
class PPDConfig:
    """The prompt tokens: how many, and how many copies of each."""

    type: Literal["ppd"] = "ppd"
    offsets: int = 3
    copies: int = 1

    def __post_init__(self) -> None:
        if self.offsets < 1 or self.copies < 1:
            raise InputError(f"offsets and copies must be at least 1, got {self.offsets} and {self.copies}")


@dataclasses.dataclass(frozen=True)
class PPDOptions(HeadOptions):
    """Head and trees. `nodes` are all rows of a pass but row 0: guesses and prompt tokens.

    Attributes:
        pruning: which prompt tokens of a tree with too many rows go: those worth least, or any; or none of them, and
            there are fewer guesses.
    """

    head: Any = PPDConfig()
    pruning: Pruning = "likely"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pruning not in get_args(Pruning):
            raise unknown_name("pruning", self.pruning, get_args(Pruning))
        least = self.depth * self.head.copies + 1
        if self.nodes < least:
            raise InputError(
                f"nodes must be at least {least}: {self.depth} prompt tokens in {self.head.copies} copies hang on row "
                f"0, and a guess needs a row; got {self.nodes}"
            )

    def trees(self, vocab: int) -> Trees:
        """Returns the trees of all states, for a model of so many tokens."""
        accuracy = usual_accuracy(self.depth) if self.accuracy is None else self.accuracy[: self.depth]
        accuracy = tuple(tuple(row[:vocab]) for row in accuracy)
        return sized_trees(accuracy, self.nodes, self.head.copies, self.pruning, self.latency)


class Tables(NamedTuple):
    """The trees of all states in arrays of one width; rows that a state's tree lacks are dead.

    Attributes:
        slot: i32[S, W], each guess's place in [K, R] guesses; for the rows of prompt tokens -1 - their number, which is
            that of the offset times E plus that of the copy. 0 for row 0 and dead rows.
        parent: i32[S, W], as in `TokenTree`; so are the next two.
        depth: i32[S, W].
        ancestors: bool[S, W, W].
        hung: i32[S, W, K*E], the rows of each row's prompt tokens; 0 where it has fewer.
        left: i32[S, W], how many prompt tokens it has: the state behind it.
    """

    slot: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    ancestors: np.ndarray
    hung: np.ndarray
    left: np.ndarray


def tables_of(trees: Trees, copies: int, ranks: int) -> Tables:
    """Returns trees in arrays: guesses breadth first, then all prompt tokens, row by row."""
    states, width = len(trees), max(tree.rows(copies) for tree in trees)
    slot, depth, left = (np.zeros((states, width), np.int32) for _ in range(3))
    parent = np.full((states, width), -1, np.int32)
    ancestors = np.tile(np.eye(width, dtype=bool), (states, 1, 1))
    hung = np.zeros((states, width, max(states - 1, 1) * copies), np.int32)
    for state, tree in enumerate(trees):
        template, row = tree.template, tree.template.width
        parent[state, :row], depth[state, :row], left[state, :row] = template.parent, template.depth, tree.prompts
        ancestors[state, :row, :row] = template.ancestors
        slot[state, 1:row] = (template.depth[1:] - 1) * ranks + template.rank[1:]
        for node, count in enumerate(tree.prompts):
            for number in range(count * copies):
                above = node if number < copies else hung[state, node, number - copies]
                parent[state, row], depth[state, row] = above, depth[state, above] + 1
                ancestors[state, row] |= ancestors[state, above]
                slot[state, row], hung[state, node, number] = -1 - number, row
                row += 1
    return Tables(slot, parent, depth, ancestors, hung, left)


def _streams(config: PPDConfig, model: Decoder) -> tuple[int, ...]:
    return ()


def _init(config: PPDConfig, model: Decoder, params: Any, key: jax.Array) -> Any:
    count, vocab = config.offsets * config.copies, model.config.vocab_size
    tokens = jax.random.randint(key, (count,), 0, max(1, vocab // 10))
    rows = jnp.take(params["embedding"]["embedding"], tokens, axis=1).T.astype(jnp.float32)
    return {"prompts": (rows * model.config.embedding_scale).reshape(config.offsets, config.copies, -1)}


def _guesses(config: PPDConfig, model: Decoder, params: Any, values: Any, reading: Reading) -> jax.Array:
    length, count = reading.tokens.shape[1], config.offsets * config.copies
    every = jnp.broadcast_to(jnp.arange(length)[None, :], reading.tokens.shape)
    reading = reading._replace(places=every) if reading.places is None else reading
    batch, places = reading.places.shape
    steps = np.repeat(np.arange(1, config.offsets + 1, dtype=np.int32), config.copies)
    sees = np.kron(np.tri(config.offsets, dtype=bool), np.eye(config.copies, dtype=bool))
    groups = Groups(reading.positions, reading.segments, sees, steps, reading.places)
    positions = (reading.at_places(reading.positions)[..., None] + steps[None, None, :]).reshape(batch, -1)
    none = jnp.full((batch, places * count), -1, jnp.int32)
    prompts = jnp.tile(values["prompts"].reshape(1, count, -1), (batch, places, 1))

    def run(module: Decoder) -> jax.Array:
        text = module.embed(reading.tokens, reading.positions)
        noted = module.layers(text, reading.positions, attend=noting_attend, ctx=Noted(reading.segments))[3]
        x = module.embed(none, positions, prompts)
        return module.layers(x, positions, attend=noted_attend, ctx=(groups, noted))[0]

    x = model.apply({"params": params}, method=run)
    return _averaged(config, model, params, x.reshape(batch, places, count, -1))


def _averaged(config: PPDConfig, model: Decoder, params: Any, x: jax.Array) -> jax.Array:
    """Returns f32[..., K, D], what the unembedding reads, of the prompt tokens' last streams [..., K*E, D]."""
    y = normed(model, params, x)
    return y.reshape(*y.shape[:-2], -1, config.copies, y.shape[-1]).mean(axis=-2)


def _trees(config: PPDConfig, accuracy: Accuracy, nodes: int) -> StateTrees:
    return by_state(prompt_trees(accuracy, nodes, config.copies))


PPD_HEAD = HeadKind(PPDConfig, _streams, _init, _guesses, some=True, trees=_trees)


@struct.dataclass
class PPDState:
    """[B, K*E, D], the last streams of the prompt tokens behind each row's last kept token, and i32[B], how many of
    the K there are.
    """

    kept: jax.Array
    state: jax.Array


def make_ppd(model: Decoder, options: PPDOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts the tree of each row's state."""
    config, last = options.head, model.config.num_layers
    trees = options.trees(model.config.vocab_size)
    ranks = max(int(tree.template.rank.max()) for tree in trees) + 1
    tables = tables_of(trees, config.copies, ranks)
    guesses = np.array([tree.template.width - 1 for tree in trees], np.int32)
    used = options.depth * config.copies
    reached = {count for tree in trees for count in tree.prompts}
    width = tables.parent.shape[1]

    def init(params: WithDraft, prompts: Prompts, slots: int, call: Call) -> PPDState:
        check_values(PPD_HEAD, config, model, params)
        dtype, batch = params.target["embedding"]["embedding"].dtype, len(prompts.lengths)
        return PPDState(jnp.zeros((batch, used, model.config.width), dtype), jnp.zeros((batch,), jnp.int32))

    def propose(params: WithDraft, state: PPDState, round_: Round):
        slot, parent, depth, ancestors = (jnp.asarray(table)[state.state] for table in tables[:4])
        tokens = slot
        if guesses.max():
            y = _averaged(config, model, params.target, state.kept)
            best = top_tokens(scores(model, params.target, y), ranks).reshape(len(slot), -1)
            tokens = jnp.where(slot < 0, slot, jnp.take_along_axis(best, jnp.maximum(slot, 0), axis=1))
        tree = TokenTree(tokens.at[:, 0].set(round_.last), parent, depth, ancestors)
        return tree, state, jnp.asarray(guesses)[state.state], jnp.zeros_like(state.state)

    def observe(params: WithDraft, state: PPDState, seen: Seen) -> PPDState:
        row = jnp.take_along_axis(seen.verified.rows, seen.verified.count[:, None] - 1, axis=1)[:, 0]
        hung = jnp.asarray(tables.hung)[state.state, row]
        kept = jnp.take_along_axis(seen.digest[last], hung[..., None], axis=1)
        return PPDState(kept, jnp.asarray(tables.left)[state.state, row])

    def embed(params: WithDraft, tree: TokenTree) -> jax.Array:
        prompts = params.draft["prompts"].reshape(-1, model.config.width)
        return jnp.take(prompts, jnp.maximum(-1 - tree.tokens, 0), axis=0, mode="clip")

    drafter = Drafter(
        width,
        max(tree.template.max_depth for tree in trees) + 1,
        options.mode,
        init,
        propose,
        observe,
        smaller=tuple(sorted({tree.rows(config.copies) for tree in (trees[state] for state in reached)} - {width})),
        digest=lambda logits, hidden: hidden,
        collect=(last,),
        embed=embed,
    )
    return make_speculative(model, drafter, stop_tokens)


PPD = Method("exact", PPDOptions, make_ppd, temperature=0.0, head=True)
