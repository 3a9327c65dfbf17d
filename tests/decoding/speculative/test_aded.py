"""ADED: the search against slow ones over a dictionary, the tree it leaves, and what all of it does to the text."""

import functools
import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.speculative.aded import AdedOptions, chosen_tree, grow, likelihoods, monte_carlo, rollouts
from decoding.speculative.trigrams import Trigrams, count_trigrams, empty_table, learn, look_up
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, greedy_texts, texts
from tests.support.toy_law import cyclic_model

VOCAB, C = 6, 6
GROUPS = 1 + C + C * C
NEWEST = jnp.asarray([[0, 1], [2, 3], [5, 5], [4, -1], [-1, 2]], jnp.int32)
SMALL = {"slots": 4096, "iterations": 20, "sentences": 6}
jitted_grow = jax.jit(grow)
jitted_rollouts = jax.jit(rollouts)
jitted_search = jax.jit(monte_carlo, static_argnums=2)
jitted_tree = jax.jit(chosen_tree, static_argnums=4)


@functools.cache
def some_table(kind: str) -> Trigrams:
    """Returns tables over six tokens: "text" (counted; some pairs unknown), "dense", "faint" (priors weigh
    no more than rewards), or "learned" (weights tie).
    """
    rng = np.random.default_rng(4)
    rows = [np.minimum(rng.geometric(0.45, 60) - 1, 5).tolist() for _ in range(2)]
    if kind == "text":
        return count_trigrams(rows, VOCAB, slots=1 << 15)
    if kind == "learned":
        window = jnp.asarray([row[:16] for row in rows], jnp.int32)
        return learn(empty_table(1 << 15, VOCAB), window, jnp.ones((2,), bool))
    table = count_trigrams([rng.integers(0, VOCAB, 6000)], VOCAB, slots=1 << 15)
    scale = rng.uniform(0.01, 9 if kind == "dense" else 0.03, table.weights.shape)
    return table.replace(weights=(table.weights * scale).astype(np.float32))


KINDS = ("text", "dense", "faint", "learned")


@functools.cache
def successors(kind: str, first: int, second: int) -> list[tuple[int, np.float32]]:
    tokens, weights = (np.asarray(x) for x in look_up(some_table(kind), jnp.asarray([first, second])))
    return [(int(token), weight) for token, weight in zip(tokens, weights, strict=True) if weight > 0]


def behind(kind: str, start: tuple[int, int], path: tuple[int, ...]) -> list[tuple[int, np.float32]]:
    return successors(kind, *[*start, *path][-2:])


def paths(kind: str, start: tuple[int, int], depth: int = 3) -> list[tuple[int, ...]]:
    """Returns the tokens of every node that a search can meet, breadth first."""
    found, level = [], [()]
    for _ in range(depth):
        level = [(*path, token) for path in level for token, _ in behind(kind, start, path)]
        found += level
    return found


def node_of(kind: str, start: tuple[int, int], path: tuple[int, ...]) -> int:
    """Returns the number of a node: the k-th child of node g is C * g + 1 + k."""
    node = 0
    for depth, token in enumerate(path):
        node = C * node + 1 + [other for other, _ in behind(kind, start, path[:depth])].index(token)
    return node


def starts() -> list[tuple[int, int]]:
    return [tuple(pair) for pair in NEWEST.tolist()]


@functools.cache
def grown(kind: str) -> tuple[np.ndarray, np.ndarray]:
    return jax.device_get(jitted_grow(some_table(kind), NEWEST))


@pytest.mark.parametrize("kind", KINDS)
def test_grow_equals_a_slow_walk(kind):
    tokens, weights = grown(kind)
    assert tokens.shape == weights.shape == (len(NEWEST), GROUPS, C)
    for row, start in enumerate(starts()):
        expected = {node_of(kind, start, path): (path[-1], dict(behind(kind, start, path[:-1]))[path[-1]])
                    for path in paths(kind, start)}  # fmt: skip
        found = np.flatnonzero(weights[row].reshape(-1) > 0)
        flat = zip(tokens[row].reshape(-1)[found].tolist(), weights[row].reshape(-1)[found], strict=True)
        assert dict(zip((found + 1).tolist(), flat, strict=True)) == expected
        assert (tokens[row][weights[row] == 0] == -1).all()
    assert len(paths(kind, (0, 1))) > {"text": 20, "learned": 5}.get(kind, 200) and paths(kind, (-1, 2)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_draw_by_weight_down_to_the_last_level(kind):
    """Each random number picks the successor at whose share of the weights it lies; no group is left out."""
    for row, start in enumerate(starts()[:3]):
        uniform = np.random.default_rng(row).random(C + 2, np.float32)

        def drawn(path, number, start=start):
            law = behind(kind, start, path)
            ends = np.cumsum([weight for _, weight in law])
            return law[int(np.argmax(ends > number * ends[-1]))] if law else (None, 0.0)

        expected = np.zeros(GROUPS)
        first = behind(kind, start, ())
        if first:
            token, expected[0] = drawn((first[0][0],), uniform[0])
            expected[0] += drawn((first[0][0], token), uniform[1])[1] if token is not None else 0.0
        for rank, (token, _) in enumerate(first):
            further = behind(kind, start, (token,))
            expected[rank + 1] = drawn((token, further[0][0]), uniform[2 + rank])[1] if further else 0.0
        rolled = jitted_rollouts(grown(kind)[1][row], uniform)
        np.testing.assert_allclose(rolled, expected, rtol=1e-6)
    assert kind != "dense" or expected[: C + 1].all()


def slow_search(kind: str, start: tuple[int, int], rolled: np.ndarray, iterations: int) -> dict[tuple, int]:
    """The card's search, node by node, with the rewards of rollouts given: {path: visits}."""
    children, visits, rewards = {(): []}, {(): 0}, {(): np.float32(0)}

    def rule(child: tuple[int, ...]) -> np.float32:
        num, own = np.float32(visits[child[:-1]]), np.float32(visits[child])
        if own == 0:
            return np.float32(np.inf)
        prior = dict(behind(kind, start, child[:-1]))[child[-1]]
        bonus = (np.float32(32) + np.log((num + np.float32(9)) / np.float32(8))) * np.sqrt(num)
        return rewards[child] / own + bonus * prior / (1 + own)

    for _ in range(iterations):
        path = [()]
        while children[path[-1]] and len(path) < 4:
            path.append(max(children[path[-1]], key=rule))  # the first of equals
        reward, last = np.float32(1), path[-1]
        if len(path) < 4 and behind(kind, start, last):
            reward += rolled[node_of(kind, start, last)]
            children[last] = [(*last, token) for token, _ in behind(kind, start, last)]
            children |= {child: [] for child in children[last]}
            visits |= {child: 0 for child in children[last]}
            rewards |= {child: np.float32(0) for child in children[last]}
            path.append(children[last][0])
        for above, node in zip(path, path[1:], strict=False):
            reward += dict(behind(kind, start, above))[node[-1]]
        for node in path:
            visits[node] += 1
            rewards[node] += reward
    return visits


@pytest.mark.parametrize("iterations", [1, 2, 7, 40, 150, 600])
@pytest.mark.parametrize("kind", KINDS)
def test_the_search_equals_a_slow_one(kind, iterations):
    different = set()
    for row, start in enumerate(starts()):
        weights = grown(kind)[1][row]
        rolled = jitted_rollouts(weights, np.random.default_rng(row).random(C + 2, np.float32))
        visits = np.asarray(jitted_search(weights, rolled, iterations)).reshape(-1)
        slow = slow_search(kind, start, np.asarray(rolled), iterations)
        expected = np.zeros(GROUPS * C)
        for path, num in slow.items():
            if path:
                expected[node_of(kind, start, path) - 1] = num
        np.testing.assert_array_equal(visits, expected)
        assert slow[()] == iterations and visits[:C].sum() == (iterations if paths(kind, start) else 0)
        assert (visits[: GROUPS - 1] >= visits.reshape(GROUPS, C).sum(axis=1)[1:]).all()
        different |= {*visits}
    assert len(different) > (4 if iterations >= 40 else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_best_first_search_equals_a_heap(kind):
    for row, start in enumerate(starts()[:3]):
        weights = grown(kind)[1][row]
        law = np.asarray(likelihoods(weights)).reshape(-1)
        heap, popped = [(-1.0, 0, ())], []
        while heap and len(popped) < 12:
            negative, node, path = heapq.heappop(heap)
            popped.append((node, -negative))
            further = behind(kind, start, path) if len(path) < 3 else []
            total = sum(float(weight) for _, weight in further)
            for token, weight in further:
                child = (*path, token)
                heapq.heappush(heap, (negative * float(weight) / total, node_of(kind, start, child), child))
        best = np.argsort(-law, kind="stable")[: len(popped) - 1]
        np.testing.assert_allclose(law[best], [likelihood for _, likelihood in popped[1:]], rtol=1e-5)
        assert kind == "learned" or {*(best + 1).tolist()} == {node for node, _ in popped[1:]}
        np.testing.assert_array_equal(law > 0, weights.reshape(-1) > 0)


def random_worth(weights: np.ndarray) -> np.ndarray:
    """Returns f32[B, G, C] as a search leaves it: whole numbers with ties, no child above its parent, some not made."""
    worth = np.random.default_rng(6).integers(-3, 12, weights.shape).astype(np.float32)
    worth = np.where((worth >= 0) & (weights > 0), worth, -np.inf)
    flat = worth.reshape(len(worth), -1)
    for node in range(1 + C, flat.shape[1] + 1):
        flat[:, node - 1] = np.minimum(flat[:, node - 1], flat[:, (node - 1) // C - 1])
    return flat.reshape(weights.shape)


def slow_tree(kind: str, start: tuple[int, int], worth: np.ndarray, options: AdedOptions) -> list[tuple[int, ...]]:
    """Returns the tree's paths: sentences, then what is behind them, cut to the width, breadth first."""
    value = {path: worth.reshape(-1)[node_of(kind, start, path) - 1] for path in paths(kind, start)}
    nodes = sorted((path for path in value if value[path] > -np.inf), key=lambda path: -value[path])
    chosen = [(), *nodes][: options.sentences]
    for path in list(chosen):
        further = behind(kind, start, path)
        if further and (*path, further[0][0]) not in chosen:
            chosen.append((*path, further[0][0]))
    order = [(), *paths(kind, start, 4)]
    return sorted(chosen[: options.width], key=order.index)


@pytest.mark.parametrize(("sentences", "width"), [(1, 65), (6, 65), (24, 65), (24, 20), (24, 30), (10, 2), (300, 700)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_is_that_of_the_chosen_sentences(kind, sentences, width):
    options = AdedOptions(sentences=sentences, width=width)
    tokens, weights = grown(kind)
    worth = random_worth(weights)
    tree = jax.device_get(jitted_tree(some_table(kind), NEWEST, tokens, worth, options))
    width = tree.tokens.shape[1]
    assert width <= options.width and width <= 2 * sentences
    for row, start in enumerate(starts()):
        parent, depth = tree.parent[row].tolist(), tree.depth[row].tolist()
        live = [0] + [place for place in range(width) if parent[place] >= 0]
        found = [()]
        for place in live[1:]:
            assert parent[place] < place and parent[place] in live
            found.append((*found[parent[place]], int(tree.tokens[row, place])))
        assert live == list(range(len(live))), "dead rows stand behind the live ones"
        assert len({*found}) == len(found), "siblings must not share a token"
        assert found == slow_tree(kind, start, worth[row], options)
        assert depth == [len(path) for path in found] + [0] * (width - len(live))
        above = [[path[: len(other)] == other for other in found] for path in found]
        expected = np.eye(width, dtype=bool)
        expected[: len(live), : len(live)] = above
        np.testing.assert_array_equal(tree.ancestors[row], expected)
    assert (tree.tokens[:, 0] == np.asarray(NEWEST)[:, 1]).all()
    assert (tree.tokens[3] == np.where(np.arange(width) == 0, -1, 0)).all(), "a table that knows nothing"


def test_by_default_no_tree_is_cut():
    options = AdedOptions()
    assert (options.slots, options.width, options.iterations, options.sentences) == (65536, 65, 150, 24)
    assert make_decode_fn(cyclic_model()[0], "aded").plan.steps().rows == 2 * 24
    assert make_decode_fn(cyclic_model()[0], "aded", width=33).plan.steps().rows == 33
    assert make_decode_fn(cyclic_model()[0], "aded").plan.steps().most == 5


@pytest.fixture(scope="module")
def greedy(tiny) -> list[list[int]]:
    return greedy_texts(*tiny, PROMPTS, ROOM)


@pytest.fixture(scope="module")
def adaptive(tiny):
    return make_decode_fn(tiny[0], "aded", max_new_tokens=ROOM, **SMALL)


def table_of(kind: str, greedy: list[list[int]]) -> Trigrams:
    whole = [prompt + text for prompt, text in zip(PROMPTS, greedy, strict=True)]
    if kind == "nothing":
        return empty_table(4096, 61)
    if kind == "corpus":
        return count_trigrams(whole, 61, slots=4096)
    rng = np.random.default_rng(2)
    if kind == "another text":
        return count_trigrams([rng.integers(0, 61, 20_000)], 61, slots=4096)
    table = count_trigrams(whole, 61, slots=4096)  # "broken": every successor of a pair is one token
    return table.replace(
        tokens=np.repeat(rng.integers(0, 61, (4096, 1), dtype=np.int32), 12, axis=1),
        weights=rng.uniform(0, 9, (4096, 12)).astype(np.float32),
    )


@pytest.mark.parametrize("kind", ["nothing", "corpus", "another text", "broken"])
def test_no_table_changes_the_text(tiny, adaptive, greedy, kind):
    output = adaptive(tiny[1], PROMPTS, warm=table_of(kind, greedy))
    assert texts(output) == greedy
    drafted, accepted = int(output.stats.drafted.sum()), int(output.stats.accepted.sum())
    assert accepted > 100 if kind == "corpus" else accepted < drafted
    assert not np.asarray(output.stats.draft_calls).any()


def cycle(start: int, num: int) -> list[int]:
    return [(start + 5 * place) % 12 for place in range(1, num + 1)]


@pytest.fixture(scope="module")
def cyclic():
    """(decode_fn, params) of a model that goes round in a cycle of twelve tokens."""
    model, params = cyclic_model()
    return make_decode_fn(model, "aded", max_new_tokens=50, **SMALL), params


def test_the_right_table_gives_five_tokens_a_step(cyclic):
    fn, params = cyclic
    table = count_trigrams([cycle(0, 40)], 12, slots=4096)
    assert ((table.weights == 1).sum(axis=1) == (table.pairs[:, 0] >= 0)).all(), "one successor each"
    output = fn(params, [[10, 3], [1, 2, 3, 8]], warm=table)
    assert texts(output) == [cycle(3, 50), cycle(8, 50)]
    assert output.stats.steps.tolist() == [10, 10] and output.stats.histogram[:, 5].tolist() == [10, 10]
    assert output.stats.drafted.tolist() == output.stats.accepted.tolist() == [40, 40]


def test_what_is_learned_on_the_way(cyclic):
    """The windows that teach are the ends of the text before each step, the prompt in them; done rows teach nothing."""
    fn, params = cyclic
    table = count_trigrams([cycle(0, 40)], 12, slots=4096)
    prompt = [7, 7, 0, 10, 3]
    output = fn(params, [prompt, [4, 9, 1, 1]], warm=table, max_new_tokens=[33, 0])
    assert output.stats.histogram[0].tolist() == [0, 0, 0, 1, 0, 6]
    whole, expected = prompt + cycle(3, 33), table
    for step in range(7):
        window = ([-1] * 16 + whole[: len(prompt) + 5 * step])[-16:]
        expected = learn(expected, jnp.asarray([window], jnp.int32), jnp.ones((1,), bool))
    jax.tree.map(np.testing.assert_array_equal, output.warm, expected)
    assert np.asarray(expected.weights).max() > 1


def test_a_cold_table_learns_within_the_text_and_stays_warm(cyclic):
    fn, params = cyclic
    first = fn(params, [[3], [3]])
    again = fn(params, [[3], [3]], warm=first.warm)
    assert texts(first) == texts(again) == [cycle(3, 50)] * 2
    assert int(again.stats.steps[0]) == 11 < int(first.stats.steps[0]) < 30  # one token alone is no pair
    assert int(first.stats.drafted[0]) < 4 * int(first.stats.steps[0])


def test_best_first_search_with_a_small_tree_in_the_smallest_cache_that_is_let_through():
    """Rows end where the cache is full, and the tree's other rows never overwrite what was kept."""
    model, params = cyclic_model()
    options = {**SMALL, "width": 4, "search": "best_first"}
    fn = make_decode_fn(model, "aded", max_new_tokens=50, cache_slots=16 + 3, **options)
    prompts = [[10, 3], [1, 2, 8, 1, 6]]
    noise = np.random.default_rng(0).integers(0, 12, 3000).tolist()
    output = fn(params, prompts, warm=count_trigrams([noise], 12, slots=4096))
    assert texts(output) == [cycle(3, 15), cycle(6, 12)]
    steps = int(output.stats.steps.sum())
    assert int(output.stats.accepted.sum()) > 0 and steps < 27 and int(output.stats.drafted.sum()) == 3 * steps
    output = fn(params, prompts, warm=count_trigrams([noise[:200], *[[1, 6, *cycle(6, 40)]] * 9], 12, slots=4096))
    assert texts(output) == [cycle(3, 15), cycle(6, 12)] and output.stats.steps.tolist() == [4, 3]


def test_mistakes(tiny, adaptive):
    for options, message in (
        ({"slots": 1000}, "slots must be a power of two, 2 to 16777216, got 1000"),
        ({"slots": 1}, "slots must be a power of two"),
        ({"width": 1}, "width must be at least 2, got 1"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"sentences": 0}, "sentences must be at least 1, got 0"),
        ({"search": "mtcs"}, "unknown search 'mtcs'. Did you mean 'mcts'"),
        ({"slots": "many"}, "slots must be a whole number, got 'many'"),
    ):
        with pytest.raises(InputError, match=message):
            make_decode_fn(tiny[0], "aded", **options)
    for warm in (empty_table(2048, 61), empty_table(4096, 5), np.zeros((4096, 2), np.int32), 3):
        with pytest.raises(InputError, match="warm must be the `warm` of an earlier output of method 'aded'"):
            adaptive(tiny[1], [[1]], warm=warm)
