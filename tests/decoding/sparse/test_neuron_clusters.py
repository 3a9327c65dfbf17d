"""Clusters of texts by their core neurons: the clustering itself, and CoreInfer with it."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.sparse.core_infer import CoreInferOptions, neuron_clusters
from decoding.sparse.neuron_clusters import cluster_neurons, elbow, k_means
from models.errors import InputError
from tests.support.decode_reference import texts
from tests.support.sparse_reference import deep_model, kept_neurons

KINDS = (3, 25, 47)  # the token that a text of each kind consists of, but for one
# With so many votes per token, the token that a text repeats decides almost alone.
OPTIONS = {"alpha": 0.8, "beta": 0.4, "first": 1, "last": 3}
NEW = 8


def prompts_of(kind: int, count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng([kind, seed])
    texts = np.full((count, 12), KINDS[kind])
    texts[np.arange(count), rng.integers(0, 12, count)] = rng.integers(0, 61, count)
    return texts.tolist()


TEXTS = [text for kind in range(3) for text in prompts_of(kind, 4, 0)]
KIND_OF_TEXT = np.repeat(np.arange(3), 4)


@pytest.fixture(scope="module")
def deep():
    return deep_model()


@pytest.fixture(scope="module")
def three(deep):
    return neuron_clusters(*deep, TEXTS, CoreInferOptions(**OPTIONS), num=3)


def chosen(deep, prompt, **options) -> list[np.ndarray]:
    """Returns the neurons of each sparse layer that a prompt decodes with."""
    fn = make_decode_fn(deep[0], "core_infer", max_new_tokens=NEW, **{**OPTIONS, **options})
    kernels = fn.start(deep[1], *fn.inputs([prompt])).kernels
    return list(kept_neurons(deep[1], kernels).values())


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def best_inertia(points: np.ndarray, num: int) -> float:
    """Returns the smallest inertia of all ways to split the points."""
    splits = (np.array(labels) for labels in itertools.product(range(num), repeat=len(points)))
    groups = ([points[labels == c] for c in range(num) if (labels == c).any()] for labels in splits)
    return min(sum(np.square(group - group.mean(axis=0)).sum() for group in split) for split in groups)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_k_means_finds_the_best_split_of_few_points(num):
    points = np.random.default_rng(1).normal(size=(7, 3)) + 4.0 * np.arange(7)[:, None] // 2
    labels, centers, inertia = k_means(points, num, 0)
    np.testing.assert_allclose(inertia, best_inertia(points, num), rtol=1e-9)
    assert sorted(set(labels.tolist())) == list(range(num)) and len(centers) == num
    for cluster in range(num):
        np.testing.assert_allclose(centers[cluster], points[labels == cluster].mean(axis=0))
    distances = np.square(points[:, None] - centers[None]).sum(axis=2)
    np.testing.assert_array_equal(distances.argmin(axis=1), labels)


def test_k_means_has_no_more_clusters_than_points_that_differ():
    labels, centers, inertia = k_means(np.array([[0.0, 1.0], [2.0, 0.0]] * 3), 5, 0)
    assert len(centers) == 2 and inertia == 0
    assert len(set(labels[::2])) == len(set(labels[1::2])) == 1 and labels[0] != labels[1]


def test_elbow():
    assert elbow([100.0, 50.0, 10.0, 9.0, 8.0]) == 3
    assert elbow([100.0, 10.0, 9.0, 8.0]) == 2
    assert elbow([5.0]) == 1 and elbow([5.0, 1.0]) == 2


def test_the_number_of_clusters_is_found_from_the_texts():
    """Six well separated kinds of texts, ten texts of each."""
    rng = np.random.default_rng(0)
    kinds = rng.random((6, 60)) < 0.3
    hot = (kinds[np.repeat(np.arange(6), 10)] ^ (rng.random((60, 60)) < 0.01)).astype(np.float32)
    clusters = cluster_neurons([4], 4, [hot], [18], None, 0, {})
    assert len(clusters.centers) == 6
    assert all(len(set(clusters.labels[10 * kind : 10 * kind + 10])) == 1 for kind in range(6))
    assert len(cluster_neurons([4], 4, [hot[:20]], [18], None, 0, {}).centers) == 4, "two kinds, four clusters at least"
    assert len(cluster_neurons([4], 4, [hot[:3]], [18], None, 0, {}).centers) <= 3


def test_lists_are_those_of_most_texts_and_free_of_duplicates(three, deep):
    assert three.layers == (1, 2, 3) and three.guide == 3 and len(three.centers) == 3
    own = [chosen(deep, text) for text in TEXTS]
    for index, sets in enumerate(three.sets):
        assert sets.shape == (3, 19)
        for cluster, neurons in enumerate(sets):
            counts = np.zeros(48, int)
            for row in np.flatnonzero(three.labels == cluster):
                counts[own[row][index]] += 1
            slow = sorted(sorted(range(48), key=lambda n, counts=counts: (-counts[n], n))[:19])
            assert neurons.tolist() == slow


def test_texts_of_a_kind_share_a_cluster_and_new_prompts_find_it(three, deep):
    assert len({tuple(pair) for pair in zip(three.labels, KIND_OF_TEXT, strict=True)}) == 3
    for kind in range(3):
        cluster = three.labels[4 * kind]
        wanted = [sets[cluster] for sets in three.sets]
        for prompt in prompts_of(kind, 2, 1):
            assert same(chosen(deep, prompt, clusters=three), wanted)
    assert not same(chosen(deep, prompt), wanted), "a prompt's own neurons must be others, or the test says nothing"


def test_a_training_text_is_assigned_to_its_own_cluster(three, deep):
    for row, text in enumerate(TEXTS):
        own = jnp.asarray(chosen(deep, text)[three.layers.index(three.guide)])
        assert int(three.nearest(own)) == three.labels[row]


def test_a_cluster_of_one_text_has_that_texts_own_neurons(deep):
    some = TEXTS[::4]
    clusters = neuron_clusters(*deep, some, CoreInferOptions(**OPTIONS))
    assert len(clusters.centers) == 3
    fns = [
        make_decode_fn(deep[0], "core_infer", max_new_tokens=NEW, **OPTIONS, **more)
        for more in ({}, {"clusters": clusters})
    ]
    for text in some:
        own, clustered = (texts(fn(deep[1], [text])) for fn in fns)
        assert own == clustered


def test_one_cluster_gives_all_prompts_the_same_neurons(deep):
    clusters = neuron_clusters(*deep, TEXTS, CoreInferOptions(**OPTIONS), num=1)
    found = [chosen(deep, prompt, clusters=clusters) for prompt in (TEXTS[0], TEXTS[-1])]
    assert same(*found) and same(found[0], [sets[0] for sets in clusters.sets])


def test_bad_input_is_refused(three, deep):
    with pytest.raises(InputError, match="no texts: pass a list of lists of token ids"):
        neuron_clusters(*deep, [])
    with pytest.raises(InputError, match="num must be at least 1 cluster, got 0"):
        neuron_clusters(*deep, TEXTS, num=0)
    with pytest.raises(InputError, match="prompt 0 is empty"):
        neuron_clusters(*deep, [[]])
    assert three.made_with == {"alpha": 0.8, "beta": 0.4, "choose": "core"}
    for other, message in (
        ({"beta": 0.5}, "clusters were made with beta 0.4, which must be the method's own: give alpha 0.8, beta 0.5, "),
        ({"alpha": 0.4}, "with alpha 0.8, which"),
        ({"choose": "absolute"}, "with choose core, which"),
        ({"first": 2}, "clusters were made for another model, or with another first or last"),
    ):
        with pytest.raises(InputError, match=message):
            make_decode_fn(deep[0], "core_infer", **{**OPTIONS, **other}, clusters=three)
