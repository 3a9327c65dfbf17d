"""Draft and verify: one step for every drafter. Propose a tree, run the target once over its rows, keep what the target
would have written itself, tell the drafter. In rows with a grammar, what leaves it is taken out of the tree first, and
the target's laws are masked as in plain constrained decoding.

Sources: speculative decoding (2211.17192, 2302.01318) over token trees (SpecInfer 2305.09781). Each row of a ragged
batch accepts its own number of tokens; no row waits for another.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decoding.grammar.trees import Masks, along, inside
from decoding.method import Call, Policy, Steps, target_params
from decoding.prefill import Prompts, prompt_tokens
from decoding.sampling import step_keys
from decoding.speculative.drafter import Drafter, Round, Seen
from decoding.speculative.target import Target, Verified
from decoding.speculative.tree import TokenTree
from decoding.speculative.verify import verify
from decoding.state import DecodeState, emit, run_if
from models.attention import TreeRows, tree_attend
from models.cache import KVCache, commit
from models.decoder import Decoder

TREE = Policy(tree_attend)
_DRAFT = 0x5EED  # folds a step's key for the drafter; the verifier folds with row numbers


@struct.dataclass
class SpeculativeCarry:
    """What every speculative method keeps: the drafter's state, the call, bool[B, V] tokens of prompt and output, and
    what the target's attention policy remembers.
    """

    draft: Any
    call: Call
    seen: jax.Array
    memory: Any = None


def make_speculative(model: Decoder, drafter: Drafter, stop_tokens: tuple[int, ...], policy: Policy = TREE) -> Steps:
    """Returns the steps of a method that drafts with `drafter` and verifies with `model`, which attends by `policy`."""
    sizes = (*drafter.smaller, drafter.width)
    finish = functools.partial(verify_step, model, drafter, stop_tokens, policy)

    def init(params: Any, prompts: Prompts, cache: KVCache, call: Call) -> SpeculativeCarry:
        read = prompts if call.draft_prompts is None else call.draft_prompts
        slots = cache.num_slots - prompts.tokens.shape[1] + read.tokens.shape[1]
        seen = prompt_tokens(prompts, model.config.vocab_size)
        draft = drafter.init(params, read, slots, call)
        call = call.replace(warm=None, draft_prompts=None)
        return SpeculativeCarry(draft, call, seen, policy.init(cache))

    def step(params: Any, state: DecodeState) -> DecodeState:
        carry = state.carry
        keys = step_keys(carry.call.keys, state.lengths)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, _DRAFT)
        round_ = Round(state.last, keys, carry.call, carry.seen, state.done, state.cache)
        tree, draft, drafted, draft_calls = drafter.propose(params, carry.draft, round_)
        masks = None
        if carry.call.grammar is not None:
            vocab = model.config.vocab_size
            masks, tree, lost = inside(carry.call.grammar, state, tree, drafter.most - 1, vocab, stop_tokens)
            drafted -= lost
        active = (~state.done).astype(jnp.int32)
        stats = state.stats.replace(
            drafted=state.stats.drafted + drafted * active, draft_calls=state.stats.draft_calls + draft_calls * active
        )
        state = state.replace(stats=stats, carry=carry.replace(draft=None))  # loops copy what they write to
        if len(sizes) == 1:
            state, found = finish(params, state, tree, masks)
        else:
            places = jnp.arange(1, drafter.width + 1)[None, :]
            needed = jnp.where((tree.parent >= 0) & ~state.done[:, None], places, 1).max()
            chosen = jnp.searchsorted(jnp.asarray(sizes), needed)
            found = _nothing(model, drafter, params, carry.seen.shape)
            for index, size in enumerate(sizes):
                cut = masks and masks.first(size)
                run = functools.partial(finish, params, tree=tree.first(size), masks=cut)
                state, found = run_if(chosen == index, lambda pair, run=run: run(pair[0]), (state, found))
        draft = drafter.observe(params, draft, Seen(tree, found.digest, found.verified, found.emitted))
        return state.replace(carry=state.carry.replace(draft=draft))

    rows = max(drafter.width, drafter.most)  # what is read behind the text, and what `commit` moves there
    return Steps(
        init,
        step,
        policy,
        rows,
        drafter.most,
        drafter.cold,
        warm=lambda carry: drafter.warm(carry.draft),
        observer=drafter.observer,
    )


@struct.dataclass
class Found:
    """What a target pass says: the verified path, i32[B] tokens that it adds, the drafter's digest of it."""

    verified: Verified
    emitted: jax.Array
    digest: Any


def verify_step(
    model: Decoder,
    drafter: Drafter,
    stop_tokens: tuple[int, ...],
    policy: Policy,
    params: Any,
    state: DecodeState,
    tree: TokenTree,
    masks: Masks | None = None,
) -> tuple[DecodeState, Found]:
    """Runs the target over a tree (or the first rows of it) and keeps what is verified; the drafter is not asked.

    `masks` say what the rows' grammars allow behind the tree's rows.
    """
    carry, call = state.carry, state.carry.call
    output = model.apply(
        {"params": target_params(params)},
        tree.tokens,
        positions=state.cache.length[:, None] + tree.depth,
        cache=state.cache,
        attend=policy.attend,
        ctx=TreeRows(tree.ancestors, tree.depth, carry.memory),
        collect=drafter.collect,
        instead=None if drafter.embed is None else drafter.embed(params, tree),
    )
    logits = output.logits if masks is None else masks.apply(output.logits, stop_tokens)
    target = Target(logits, call.sampling, carry.seen, call.keys, state.lengths)
    verified = verify(drafter.mode, tree, target, drafter.most)
    after = emit(state, verified.tokens, verified.count, stop_tokens)
    emitted = after.lengths - state.lengths
    accepted = after.stats.accepted + jnp.minimum(emitted, verified.count - 1)
    kept = jnp.arange(drafter.most)[None, :] < emitted[:, None]
    seen = carry.seen.at[jnp.arange(len(emitted))[:, None], verified.tokens].max(kept)
    cache = commit(output.cache, verified.rows, jnp.where(state.done, 0, verified.count))
    unread = drafter.width - tree.tokens.shape[1]
    digest = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, unread), *((0, 0) for _ in x.shape[2:]))),
        drafter.digest(output.logits, output.hidden),
    )
    if masks is not None:
        call = call.replace(grammar=along(call.grammar, verified.tokens, emitted))
    carry = carry.replace(call=call, seen=seen, memory=output.aux.memory)
    after = after.replace(cache=cache, stats=after.stats.replace(accepted=accepted), carry=carry)
    return after, Found(verified, emitted, digest)


def _nothing(model: Decoder, drafter: Drafter, params: Any, shape: tuple[int, int]) -> Found:
    """Returns zeros in the form of what a pass says; `shape` is (B, V)."""
    batch, vocab = shape
    dtype = target_params(params)["embedding"]["embedding"].dtype
    stream = jax.ShapeDtypeStruct((batch, drafter.width, model.config.width), dtype)
    logits = jax.ShapeDtypeStruct((batch, drafter.width, vocab), jnp.float32)
    digest = jax.eval_shape(drafter.digest, logits, dict.fromkeys(drafter.collect, stream))
    path, count = jnp.zeros((batch, drafter.most), jnp.int32), jnp.zeros((batch,), jnp.int32)
    return Found(Verified(path, path, count), count, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), digest))
