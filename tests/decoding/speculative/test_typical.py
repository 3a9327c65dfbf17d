"""Typical acceptance against every path of the tree, one by one; what its label says; settings that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import METHODS, WithDraft, make_decode_fn
from decoding.sampling import Sampling
from decoding.speculative.medusa import MEDUSA_HEAD, MedusaConfig, MedusaOptions
from decoding.speculative.target import Target
from decoding.speculative.tree import Template
from decoding.speculative.typical import threshold, typical
from decoding.speculative.verify import verify
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, filtered, greedy_texts, softmax, texts

PATHS = ((), (0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (1, 0, 0))
BATCH, VOCAB, MOST = 60, 6, 4
TEMPERATURES = (0.0, 0.5, 1.0, 1.7)


def law_of(logits: np.ndarray, seen: set[int], **settings) -> np.ndarray:
    """One law, by sorting and walking; all on the first of the likeliest tokens at temperature 0."""
    if settings["temperature"] == 0:
        return np.eye(VOCAB)[int(np.argmax(logits))]
    return softmax(filtered(logits, seen, **settings)[0])


def expected(template: Template, tokens: np.ndarray, logits: np.ndarray, epsilon: float, dead: set[int], **settings):
    """Tokens that a row of the batch keeps: every path is tried."""
    best: tuple[int, float, int] = (0, 0.0, 0)
    laws = [law_of(logits[row], set(), **settings) for row in range(len(PATHS))]
    for row, path in enumerate(template.paths):
        nodes = [template.paths.index(path[:depth]) for depth in range(len(path) + 1)]
        likelihood, stays = 0.0, not dead & set(nodes)
        for above, node in zip(nodes, nodes[1:], strict=False):
            law = laws[above]
            entropy = -sum(p * np.log(p) for p in law if p > 0)
            chance = law[tokens[node]]
            stays &= bool(chance > min(epsilon, np.sqrt(epsilon) * np.exp(-entropy)))
            likelihood += np.log(max(chance, 1e-30))
        if stays and (len(path), likelihood) > best[:2]:
            best = len(path), likelihood, row
    path = template.paths[best[2]]
    kept = [int(tokens[template.paths.index(path[: depth + 1])]) for depth in range(len(path))]
    return [*kept, int(np.argmax(laws[best[2]]))]


@pytest.mark.parametrize("epsilon", [0.09, 0.4])
def test_every_path_is_tried(epsilon):
    """Rows of all temperatures, some with filters, trees with dead rows."""
    template, rng = Template(PATHS), np.random.default_rng(3)
    logits = (2.0 * rng.standard_normal((BATCH, len(PATHS), VOCAB))).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (BATCH, len(PATHS))).astype(np.int32)
    temperature = np.resize(TEMPERATURES, BATCH).astype(np.float32)
    top_k = np.where(np.arange(BATCH) % 3 == 0, 3, 0).astype(np.int32)
    ones = np.ones(BATCH, np.float32)
    sampling = Sampling(temperature, top_k, ones, 0 * ones, ones)
    dead = [
        {1, 4, 5, 8} if row % 5 == 0 else {9} if row % 5 == 1 else {7} if row % 5 == 2 else set()
        for row in range(BATCH)
    ]
    tree = template.tree(jnp.asarray(tokens))
    gone = np.array([[row in own for row in range(len(PATHS))] for own in dead])
    none = gone & (np.arange(BATCH)[:, None] % 5 == 2)  # rows without a token
    tree = tree.replace(tokens=jnp.where(none, -1, tree.tokens), parent=jnp.where(gone & ~none, -1, tree.parent))
    keys = jax.vmap(jax.random.key)(jnp.arange(BATCH))
    target = Target(jnp.asarray(logits), sampling, jnp.zeros((BATCH, VOCAB), bool), keys, jnp.zeros(BATCH, jnp.int32))
    verified = jax.jit(lambda tree, target: verify(typical(epsilon), tree, target, MOST))(tree, target)
    lengths = []
    for row in range(BATCH):
        settings = {"temperature": float(temperature[row]), "top_k": int(top_k[row])}
        want = expected(template, tokens[row], logits[row], epsilon, dead[row], **settings)
        count = int(verified.count[row])
        assert verified.tokens[row, :count].tolist() == want, row
        rows = verified.rows[row].tolist()
        assert rows[0] == 0 and not any(rows[count:]) and tokens[row, rows[1:count]].tolist() == want[:-1]
        lengths.append(count)
    assert set(lengths) == {1, 2, 3, 4} and len({n for n in lengths[:: len(TEMPERATURES)]}) > 1


def test_the_threshold():
    sure, even = np.eye(VOCAB, dtype=np.float32)[0], np.full(VOCAB, 1 / VOCAB, np.float32)
    np.testing.assert_allclose(threshold(jnp.stack([sure, even]), 0.09), [0.09, 0.3 / VOCAB], rtol=1e-6)


@pytest.fixture(scope="module")
def decoded(tiny):
    """(label, greedy text at temperature 0, typical text at temperature 1 with two seeds, steps of both)."""
    model, params = tiny
    fn = make_decode_fn(model, "medusa", max_new_tokens=12, nodes=9, acceptance="typical", epsilon=0.02)
    head = MEDUSA_HEAD.init(MedusaConfig(), model, params, jax.random.key(5))
    both = WithDraft(params, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), head))
    cold, warm, again = fn(both, PROMPTS), fn(both, PROMPTS, temperature=3.0), fn(both, PROMPTS, 7, temperature=3.0)
    return fn.label, texts(cold), texts(warm), texts(again), int(cold.stats.steps.sum()), int(warm.stats.steps.sum())


def test_at_temperature_zero_it_is_greedy_and_above_it_is_not(tiny, decoded):
    label, cold, warm, again, cold_steps, warm_steps = decoded
    assert label == "lossy" and cold == greedy_texts(*tiny, PROMPTS, 12)
    assert warm == again != cold and warm_steps < cold_steps


def test_labels_follow_the_options():
    for name in ("medusa", "eagle", "hidden_transfer", "ppd"):
        method = METHODS[name]
        assert method.label_of(method.options()) == method.label == "exact"
        assert method.label_of(method.options(acceptance="typical")) == "lossy"
    assert METHODS["sample"].label_of(METHODS["sample"].options()) == "distribution"


def test_settings_out_of_range():
    with pytest.raises(InputError, match="unknown acceptance 'typcal'. Did you mean 'typical'?"):
        MedusaOptions(acceptance="typcal")
    for epsilon in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(InputError, match="epsilon is a probability between 0 and 1"):
            MedusaOptions(epsilon=epsilon)
