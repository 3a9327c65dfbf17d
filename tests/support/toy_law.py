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
from decoding.speculative.target import Target, Verified
from decoding.speculative.tree import Template, TokenTree
from decoding.speculative.verify import Mode, verify
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


def children(law: np.ndarray, how: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns i[B, X, C] children under laws f32[B, X, V], first sibling first.

    `how` is "iid" (independent draws), "wor" (without replacement, by Gumbel top-k), "sorted" (as wor, but not in the
    order drawn), or "top" (the likeliest, no draw).
    """
    with np.errstate(divide="ignore"):
        scores = np.log(law)[:, :, None]
    noise = rng.gumbel(size=(*law.shape[:2], count if how == "iid" else 1, law.shape[2]))
    if how == "iid":
        return np.argmax(scores + noise, axis=-1)
    scores = scores[:, :, 0] if how == "top" else (scores + noise)[:, :, 0]
    tokens = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    return np.sort(tokens, axis=-1) if how == "sorted" else tokens


def draft(template: Template, how: str, q: np.ndarray) -> TokenTree:
    """Returns trees whose children are drawn from the table q f32[T, V]; see `children`. No draw, no laws."""
    rng = np.random.default_rng(7)
    tokens = np.full((DRAWS, template.width), FIRST, np.int32)
    prefix = np.zeros((DRAWS, template.width), np.int32)
    for start, stop in template.levels:
        parent, rank = template.parent[start:stop], template.rank[start:stop]
        above = np.unique(parent)
        drawn = children(q[prefix[:, above]], how, int(rank.max()) + 1, rng)
        tokens[:, start:stop] = drawn[:, np.searchsorted(above, parent), rank]
        prefix[:, start:stop] = prefix[:, parent] * q.shape[1] + 1 + tokens[:, start:stop]
    return padded(template.tree(tokens, None if how == "top" else q[prefix[:, : template.parents]]))


def padded(tree: TokenTree) -> TokenTree:
    """Returns the trees with dead rows up to `WIDTH`, and room for laws up to `PARENTS`."""
    more = WIDTH - tree.tokens.shape[1]
    laws = tree.laws
    return TokenTree(
        tokens=np.pad(tree.tokens, ((0, 0), (0, more))),
        parent=np.pad(np.broadcast_to(tree.parent, tree.tokens.shape), ((0, 0), (0, more)), constant_values=-1),
        depth=np.pad(tree.depth, ((0, 0), (0, more))),
        ancestors=np.pad(tree.ancestors, ((0, 0), (0, more), (0, more))) | np.eye(WIDTH, dtype=bool),
        laws=laws if laws is None else np.pad(laws, ((0, 0), (0, PARENTS - laws.shape[1]), (0, 0))),
    )


def prefixes(tree: TokenTree, vocab: int) -> np.ndarray:
    """Returns i32[B, W]: the prefix that each row's path spells, found by walking up to row 0."""
    found = np.zeros_like(tree.tokens)
    batch = np.arange(len(found))
    for row in range(1, found.shape[1]):
        found[:, row] = found[batch, np.maximum(tree.parent[:, row], 0)] * vocab + 1 + tree.tokens[:, row]
    return np.where(tree.parent >= 0, found, 0)


def settings(**changes: float | np.ndarray) -> Sampling:
    """Returns plain sampling at temperature 1 but for the changes, each one number or one per row."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0} | changes
    dtypes = {name: np.int32 if name == "top_k" else np.float32 for name in values}
    return Sampling(**{name: np.full(DRAWS, x, dtypes[name]) for name, x in values.items()})


def target_of(p: np.ndarray, tree: TokenTree, sampling: Sampling) -> Target:
    """Returns the table p f32[T, V] as the target of these trees; rows are at different lengths of their text."""
    with np.errstate(divide="ignore"):
        logits = np.log(p)[prefixes(tree, p.shape[1])]
    seen = np.broadcast_to(np.arange(p.shape[1])[None, :] == FIRST, (DRAWS, p.shape[1]))
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return Target(logits, sampling, seen, keys, np.arange(DRAWS, dtype=np.int32) % 5)


jitted_verify = jax.jit(verify, static_argnums=(0, 3))


def run(mode: Mode, tree: TokenTree, p: np.ndarray, sampling: Sampling | None = None) -> Verified:
    """Verifies the trees under the table p, and checks the form of what comes back. All arrays are NumPy's."""
    target = target_of(p, tree, settings() if sampling is None else sampling)
    verified = jax.device_get(jitted_verify(mode, tree, target, DEPTH + 1))
    check_form(tree, verified)
    return verified


def check_form(tree: TokenTree, verified: Verified) -> None:
    """The rows are a path from row 0 down, the tokens are theirs and one more, and all is zero from count on."""
    rows, tokens, count = verified.rows, verified.tokens, verified.count
    batch, most = rows.shape
    assert rows.dtype == tokens.dtype == count.dtype == np.int32 and tokens.shape == rows.shape
    index, place = np.arange(batch)[:, None], np.arange(most)[None, :]
    assert (count >= 1).all() and (count <= most).all() and (rows[:, 0] == 0).all()
    assert not rows[place >= count[:, None]].any() and not tokens[place >= count[:, None]].any()
    inside = place[:, 1:] < count[:, None]
    assert (tree.parent[index, rows[:, 1:]] == rows[:, :-1])[inside].all(), "rows must follow each other"
    assert (tree.tokens[index, rows[:, 1:]] == tokens[:, :-1])[inside].all(), "tokens must be the rows' own"


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
    first, second = verified.tokens[:, 0], verified.tokens[:, 1]
    ends = np.cumsum(exact.reshape(vocab, vocab), axis=1)
    ends /= np.maximum(ends[:, -1:], 1e-300)
    uniform = np.random.default_rng(seed).random(len(first))
    own = np.minimum((ends[first] <= uniform[:, None]).sum(axis=1), vocab - 1)
    return first * vocab + np.where(verified.count > 1, second, own)


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
