"""Recursive speculative decoding: trees whose siblings are drawn without replacement.

Source: "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without Replacement" (2402.14160).
RSD-C gives every row of a level the same number of children (Gumbel top-k). RSD-S is a stochastic beam search
(1903.06059): `beams` rows per level, the best of all children of the level above by a perturbed log-probability that is
conditioned on the parent's own, so that a row's children are still a draw without replacement.

Where a row is greedy and the draft has no temperature of its own, both take the likeliest children and draw nothing:
the limit of temperature 0. The paper's drafts always sample.

Axis letters: B batch, T rows of a level, W beams, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from decoding.method import Call, Method, Steps
from decoding.prefill import Prompts
from decoding.sampling import top_tokens
from decoding.speculative.draft_model import (
    DraftOptions,
    DraftStream,
    by_rank,
    check_draft,
    draft_law,
    draw_children,
    keep,
    noise,
    read_newest,
    read_rows,
    start_stream,
)
from decoding.speculative.drafter import Drafter, Round, Seen
from decoding.speculative.loop import make_speculative
from decoding.speculative.tree import TokenTree, branching, grown
from models.decoder import Decoder
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class RSDCOptions(DraftOptions):
    """Children per row at each depth."""

    children: tuple[int, ...] = (2, 2, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "children", tuple(self.children))
        if not self.children:
            raise InputError("children is empty: give the number of children at each depth, as (2, 2, 1)")


@dataclasses.dataclass(frozen=True)
class RSDSOptions(DraftOptions):
    """Beams (rows per level), and their depth."""

    beams: int = 3
    depth: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beams < 1 or self.depth < 1:
            raise InputError(f"beams and depth must be at least 1, got {self.beams} and {self.depth}")


def make_rsd_c(model: Decoder, options: RSDCOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts a tree of constant branching."""
    draft = check_draft(model, options.draft, "rsd_c")
    template = branching(options.children)
    _check_siblings(max(options.children), model)

    def propose(params: Any, stream: DraftStream, round_: Round):
        shape = template.tree(round_.last[:, None])
        tokens, live = round_.last[:, None], jnp.ones_like(round_.last[:, None], bool)
        logits, stream = read_newest(draft, params.draft, stream, round_)
        logits, laws = logits[:, None], []
        ranked = by_rank(round_, options.draft_temperature)
        for level, (start, stop) in enumerate(template.levels):
            laws.append(draft_law(logits, round_, options.draft_temperature))
            keys = jax.vmap(jax.random.fold_in, (0, None))(round_.keys, level)
            children, alive = draw_children(laws[-1], options.children[level], keys, ranked)
            alive &= live[:, -children.shape[1] :, None]
            batch = len(round_.last)
            tokens = jnp.concatenate([tokens, children.reshape(batch, -1)], axis=1)
            live = jnp.concatenate([live, alive.reshape(batch, -1)], axis=1)
            if stop < template.width:
                ancestors = shape.ancestors[:, start:stop, :stop]
                logits, stream = read_rows(
                    draft, params.draft, stream, tokens[:, start:stop], ancestors, shape.depth[:, :stop]
                )
        tree = template.tree(tokens, jnp.concatenate(laws, axis=1))
        tree = tree.replace(parent=jnp.where(live, tree.parent, -1))
        drafted = live.sum(axis=1, dtype=jnp.int32) - 1
        return tree, stream, drafted, jnp.full_like(drafted, template.max_depth)

    return _make(model, draft, stop_tokens, template.width, template.max_depth, template.parents, propose)


def make_rsd_s(model: Decoder, options: RSDSOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts a tree by stochastic beam search."""
    draft = check_draft(model, options.draft, "rsd_s")
    beams, width = options.beams, 1 + options.beams * options.depth
    _check_siblings(beams, model)

    def propose(params: Any, stream: DraftStream, round_: Round):
        batch = len(round_.last)
        tokens, laws = round_.last[:, None], []
        parent, depth = jnp.full((batch, 1), -1), jnp.zeros((1, 1), jnp.int32)
        ancestors = jnp.ones((batch, 1, 1), bool)
        log_q = perturbed = jnp.zeros((batch, 1), jnp.float32)
        logits, stream = read_newest(draft, params.draft, stream, round_)
        logits, ranked = logits[:, None], by_rank(round_, options.draft_temperature)
        for level in range(1, options.depth + 1):
            laws.append(draft_law(logits, round_, options.draft_temperature))
            keys = jax.vmap(jax.random.fold_in, (0, None))(round_.keys, level)
            row, token, log_q, perturbed = next_beams(laws[-1], log_q, perturbed, beams, keys, ranked)
            row += tokens.shape[1] - laws[-1].shape[1]  # from a place in the level to a row of the tree
            parent = jnp.concatenate([parent, jnp.where(perturbed > -jnp.inf, row, -1)], axis=1)
            tokens = jnp.concatenate([tokens, token], axis=1)
            depth = jnp.concatenate([depth, jnp.full((1, beams), level)], axis=1)
            ancestors = grown(ancestors, row)
            if level < options.depth:
                logits, stream = read_rows(draft, params.draft, stream, token, ancestors[:, -beams:], depth)
        tree = TokenTree(tokens, parent, depth, ancestors, jnp.concatenate(laws, axis=1))
        drafted = (parent >= 0).sum(axis=1, dtype=jnp.int32)
        return tree, stream, drafted, jnp.full_like(drafted, options.depth)

    return _make(model, draft, stop_tokens, width, options.depth, width - beams, propose)


def next_beams(
    law: jax.Array, log_q: jax.Array, perturbed: jax.Array, beams: int, keys: jax.Array, ranked: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the beams of the next level, best first: (place of the parent in its level, token, log q, perturbed).

    Each is [B, W]. A child's perturbed value is its log-probability plus Gumbel noise, conditioned on the maximum over
    all children of its parent being the parent's own value (1903.06059, section 4.2 and appendix B.3, the stable form).
    Beams that run out of children have value -inf.

    Args:
        law: f32[B, T, V], the draft's law behind each row of the level.
        log_q: f32[B, T], log-probability of each row's path.
        perturbed: f32[B, T], its perturbed value.
        beams: W.
        keys: one key per batch row.
        ranked: bool[B], batch rows without noise (plain beam search).
    """
    phi = log_q[..., None] + jnp.log(law)
    g = phi + noise(keys, law.shape[1:], ranked)
    top = g.max(axis=-1, keepdims=True)
    gap = jnp.minimum(jnp.where(g > -jnp.inf, g, 0.0) - jnp.where(top > -jnp.inf, top, 0.0), 0.0)
    v = perturbed[..., None] - g + jnp.where(gap < 0, jnp.log(-jnp.expm1(jnp.where(gap < 0, gap, -1.0))), -jnp.inf)
    value = perturbed[..., None] - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
    value = jnp.where(ranked[:, None, None], phi, value)
    value = jnp.where(phi > -jnp.inf, value, -jnp.inf)
    flat = value.reshape(len(value), -1)
    chosen = top_tokens(flat, beams)
    phi, value = (jnp.take_along_axis(x.reshape(len(x), -1), chosen, axis=1) for x in (phi, value))
    return chosen // law.shape[-1], chosen % law.shape[-1], phi, value


def _check_siblings(count: int, model: Decoder) -> None:
    if count > model.config.vocab_size:
        raise InputError(f"{count} siblings cannot be drawn from a vocabulary of {model.config.vocab_size} tokens")


def _make(model: Decoder, draft: Decoder, stop_tokens, width: int, max_depth: int, read: int, propose) -> Steps:
    """Returns the steps of a tree whose rows below `read` the draft has in its cache."""

    def init(params: Any, prompts: Prompts, slots: int, call: Call) -> DraftStream:
        return start_stream(draft, params.draft, prompts, slots)

    def observe(params: Any, stream: DraftStream, seen: Seen) -> DraftStream:
        return keep(stream, seen.verified, seen.verified.tokens, read)

    drafter = Drafter(width, max_depth + 1, "rrs_wor", init, propose, observe)
    return make_speculative(model, drafter, stop_tokens)


RSD_C = Method("exact", RSDCOptions, make_rsd_c, temperature=0.0, drafts=True)
RSD_S = Method("exact", RSDSOptions, make_rsd_s, temperature=0.0, drafts=True)
