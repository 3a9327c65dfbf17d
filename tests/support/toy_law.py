"""A language model that is a table of laws, one per prefix, and the law of what a verifier makes of its drafts.

Texts begin behind row 0 of the tree, whose token is always `FIRST`. A prefix is numbered like a node of a heap: the
empty one 0, and prefix i with token t behind it i * V + 1 + t.

Axis letters: B batch, W tree rows, V vocabulary, T prefixes, C children per row.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from decoding.sampling import Sampling
from decoding.speculative.tree import Template, TokenTree
from decoding.speculative.verify import Mode, Target, Verified, verify
from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig
from models.decoder import Decoder
from tests.support.decode_reference import filtered, softmax

VOCAB = 4
DEPTH = 3  # drafted tokens at most
WIDTH, PARENTS = 13, 6  # all trees are padded to these, so that each mode compiles once
FIRST = 0
DRAWS = 40_000


def table(seed: int, vocab: int = VOCAB) -> np.ndarray:
    """Returns f32[T, V]: the law behind each prefix of up to `DEPTH` tokens, far from uniform."""
    rows = sum(vocab**depth for depth in range(DEPTH + 1))
    return np.random.default_rng(seed).dirichlet([0.8] * vocab, rows).astype(np.float32)


def children(law: jax.Array, how: str, count: int, key: jax.Array) -> jax.Array:
    """Returns i32[B, X, C] children under laws f32[B, X, V], first sibling first.

    `how` is "iid" (independent draws), "wor" (without replacement, by Gumbel top-k), "sorted" (as wor, but not in the
    order drawn), or "top" (the likeliest, no draw).
    """
    if how == "iid":
        return jnp.moveaxis(jax.random.categorical(key, jnp.log(law), shape=(count, *law.shape[:2])), 0, -1)
    noise = 0.0 if how == "top" else jax.random.gumbel(key, law.shape)
    tokens = jax.lax.top_k(jnp.log(law) + noise, count)[1]
    return jnp.sort(tokens, axis=-1) if how == "sorted" else tokens


@functools.partial(jax.jit, static_argnums=(0, 1))
def draft(template: Template, how: str, q: jax.Array, key: jax.Array) -> TokenTree:
    """Returns trees whose children are drawn from the table q f32[T, V]; see `children`. No laws where none is drawn."""
    vocab = q.shape[1]
    tokens = jnp.full((DRAWS, template.width), FIRST, jnp.int32)
    prefix = jnp.zeros((DRAWS, template.width), jnp.int32)
    for level, (start, stop) in enumerate(template.levels):
        parent, rank = template.parent[start:stop], template.rank[start:stop]
        above = np.unique(parent)
        drawn = children(q[prefix[:, above]], how, int(rank.max()) + 1, jax.random.fold_in(key, level))
        new = drawn[:, np.searchsorted(above, parent), rank].astype(jnp.int32)
        tokens = tokens.at[:, start:stop].set(new)
        prefix = prefix.at[:, start:stop].set(prefix[:, parent] * vocab + 1 + new)
    return padded(template.tree(tokens, None if how == "top" else q[prefix[:, : template.parents]]))


def padded(tree: TokenTree) -> TokenTree:
    """Returns the trees with dead rows up to `WIDTH`, and room for laws up to `PARENTS`."""
    more = WIDTH - tree.tokens.shape[1]
    parent = jnp.broadcast_to(tree.parent, tree.tokens.shape)
    return TokenTree(
        tokens=jnp.pad(tree.tokens, ((0, 0), (0, more))),
        parent=jnp.pad(parent, ((0, 0), (0, more)), constant_values=-1),
        depth=jnp.pad(tree.depth, ((0, 0), (0, more))),
        ancestors=jnp.pad(tree.ancestors, ((0, 0), (0, more), (0, more))) | jnp.eye(WIDTH, dtype=bool)[None],
        laws=tree.laws
        if tree.laws is None
        else jnp.pad(tree.laws, ((0, 0), (0, PARENTS - tree.laws.shape[1]), (0, 0))),
    )


def prefixes(tree: TokenTree, vocab: int) -> jax.Array:
    """Returns i32[B, W]: the prefix that each row's path spells, found by walking up to row 0."""
    batch, width = tree.tokens.shape
    parent = jnp.broadcast_to(tree.parent, (batch, width))
    found = jnp.zeros((batch, width), jnp.int32)
    for row in range(1, width):
        above = jnp.take_along_axis(found, jnp.maximum(parent[:, row : row + 1], 0), axis=1)[:, 0]
        found = found.at[:, row].set(above * vocab + 1 + tree.tokens[:, row])
    return found


def settings(**changes: float | np.ndarray) -> Sampling:
    """Returns plain sampling at temperature 1 but for the changes, each one number or one per row."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0} | changes
    dtypes = {name: jnp.int32 if name == "top_k" else jnp.float32 for name in values}
    return Sampling(**{name: jnp.broadcast_to(jnp.asarray(x, dtypes[name]), (DRAWS,)) for name, x in values.items()})


def target_of(p: jax.Array, tree: TokenTree, sampling: Sampling) -> Target:
    """Returns the table p f32[T, V] as the target of these trees; rows are at different lengths of their text."""
    batch, vocab = tree.tokens.shape[0], p.shape[1]
    keys = jax.random.split(jax.random.key(0), batch)
    seen = jnp.broadcast_to(jnp.arange(vocab)[None, :] == FIRST, (batch, vocab))
    return Target(jnp.log(p)[prefixes(tree, vocab)], sampling, seen, keys, jnp.arange(batch, dtype=jnp.int32) % 5)


@functools.partial(jax.jit, static_argnums=0)
def _verify(mode: Mode, tree: TokenTree, p: jax.Array, sampling: Sampling) -> Verified:
    return verify(mode, tree, target_of(p, tree, sampling), DEPTH + 1)


def run(mode: Mode, tree: TokenTree, p: np.ndarray, sampling: Sampling | None = None) -> Verified:
    """Verifies the trees under the table p, and checks the form of what comes back."""
    sampling = settings() if sampling is None else sampling
    verified = _verify(mode, tree, jnp.asarray(p), sampling)
    check_form(tree, verified)
    return verified


def check_form(tree: TokenTree, verified: Verified) -> None:
    """The rows are a path from row 0 down, the tokens are theirs and one more, and all is zero from count on."""
    rows, tokens, count = (np.asarray(x) for x in (verified.rows, verified.tokens, verified.count))
    batch, most = rows.shape
    assert rows.dtype == tokens.dtype == count.dtype == np.int32 and tokens.shape == rows.shape
    parent = np.broadcast_to(np.asarray(tree.parent), tree.tokens.shape)
    index, place = np.arange(batch)[:, None], np.arange(most)[None, :]
    assert (count >= 1).all() and (count <= most).all() and (rows[:, 0] == 0).all()
    assert not rows[place >= count[:, None]].any() and not tokens[place >= count[:, None]].any()
    inside = place[:, 1:] < count[:, None]
    assert (parent[index, rows[:, 1:]] == rows[:, :-1])[inside].all(), "rows must follow each other"
    assert (np.asarray(tree.tokens)[index, rows[:, 1:]] == tokens[:, :-1])[inside].all(), "tokens must be the rows' own"


def exact_pairs(p: np.ndarray, **changes: float) -> np.ndarray:
    """Returns f64[V * V]: the probability of each pair of first two tokens, by plain sampling with these settings."""
    with np.errstate(divide="ignore"):
        logits = np.log(p.astype(np.float64))
    vocab = p.shape[1]
    first = softmax(filtered(logits[0], {FIRST}, **changes)[0])
    second = [softmax(filtered(logits[1 + token], {FIRST, token}, **changes)[0]) for token in range(vocab)]
    return np.concatenate([first[token] * second[token] for token in range(vocab)])


def drawn_pairs(verified: Verified, exact: np.ndarray, seed: int = 1) -> np.ndarray:
    """Returns i[B]: first token * V + second token; a missing second token is drawn from the exact law f64[V * V]."""
    vocab = int(len(exact) ** 0.5)
    tokens, count = np.asarray(verified.tokens), np.asarray(verified.count)
    first = tokens[:, 0]
    ends = np.cumsum(exact.reshape(vocab, vocab), axis=1)
    ends /= np.maximum(ends[:, -1:], 1e-300)
    uniform = np.random.default_rng(seed).random(len(first))
    own = np.minimum((ends[first] <= uniform[:, None]).sum(axis=1), vocab - 1)
    return first * vocab + np.where(count > 1, tokens[:, min(1, tokens.shape[1] - 1)], own)


@functools.cache
def cyclic_model(vocab: int = 12) -> tuple[Decoder, dict]:
    """Returns (model, params) that always goes from token t to (t + 5) mod V: attention and MLP give zeros."""
    block = BlockConfig(AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4), MLPConfig(12))
    model = Decoder(DecoderConfig("llama", vocab_size=vocab, width=vocab, blocks=(block,), max_length=256))
    params = dict(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    params["layers_0"] = jax.tree.map(lambda x: x * 0.0 if x.ndim == 2 else x, params["layers_0"])
    params["embedding"] = {"embedding": jnp.eye(vocab)}
    noise = np.random.default_rng(0).normal(size=(vocab, vocab))
    params["unembedding"] = {"kernel": jnp.asarray(noise + 9 * np.roll(np.eye(vocab), 5, axis=1), jnp.float32)}
    return model, params
