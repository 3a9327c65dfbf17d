"""Kinds of prompts by the neurons that they use: CoreInfer's similarity-guided choice (2410.18311).

Offline, texts are clustered by their core neurons in one layer, as vectors of zeros and ones. For each cluster and
layer the neurons are kept that are core neurons of most of its texts. Online, a prompt takes the neurons of the cluster
that its own core neurons in that layer are nearest to.

Notes: texts and prompts are told apart by the very neurons that they would decode with, where the released code takes
the 3000 most frequent (of 11008 to 16384), and another vector online than offline.

Axis letters: P points (texts), F features (neurons), C clusters, N neurons chosen.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

MOST_CLUSTERS, FEWEST_CLUSTERS = 10, 4
_TRIALS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Clusters:
    """The neurons of each cluster. Compared by identity, to be an option of a method.

    Attributes:
        layers: the layers that have neurons.
        guide: the one that tells clusters apart.
        centers: f32[C, F], mean of the texts' zeros and ones in that layer.
        sets: for each layer i32[C, N], in ascending order.
        labels: i[P], the cluster of each text.
        made_with: the options that say what core neurons are, by their names.
    """

    layers: tuple[int, ...]
    guide: int
    centers: np.ndarray
    sets: tuple[np.ndarray, ...]
    labels: np.ndarray
    made_with: Mapping[str, float | str]

    def nearest(self, neurons: jax.Array) -> jax.Array:
        """Returns i32[]: the cluster of a prompt with these core neurons, i32[N], in the guiding layer."""
        centers = jnp.asarray(self.centers)
        hot = jnp.zeros((centers.shape[1],)).at[neurons].set(1.0)
        return jnp.square(centers - hot[None, :]).sum(axis=1).argmin()


def cluster_neurons(
    layers: Sequence[int],
    guide: int,
    hot: Sequence[np.ndarray],
    sizes: Sequence[int],
    num: int | None,
    seed: int,
    made_with: Mapping[str, float | str],
) -> Clusters:
    """Returns the clusters of texts whose core neurons are known.

    Args:
        layers: the layers that have neurons.
        guide: the one whose neurons are clustered.
        hot: for each layer f[P, F], 1 for the core neurons of each text.
        sizes: for each layer N.
        num: clusters, C; None: by the elbow of the inertia over 1 to 10, 4 at least. Never more than there are
            different texts.
        seed: of the clustering.
        made_with: what to note of how the neurons were chosen.
    """
    points = hot[list(layers).index(guide)].astype(np.float64)
    if num is None:
        most = min(MOST_CLUSTERS, len(points))
        inertias = [k_means(points, count, seed)[2] for count in range(1, most + 1)]
        num = min(max(elbow(inertias), FEWEST_CLUSTERS), most)
    labels, centers, _ = k_means(points, num, seed)

    def kept(layer: np.ndarray, size: int) -> np.ndarray:
        counts = np.stack([layer[labels == cluster].sum(axis=0) for cluster in range(len(centers))])
        ranked = np.argsort(-counts, axis=1, kind="stable")  # of equal ones those of lower index
        return np.sort(ranked[:, :size], axis=1).astype(np.int32)

    sets = tuple(kept(layer, size) for layer, size in zip(hot, sizes, strict=True))
    return Clusters(tuple(layers), guide, centers.astype(np.float32), sets, labels, dict(made_with))


def elbow(inertias: Sequence[float]) -> int:
    """Returns the number of clusters with the largest second difference of inertia; entry i is that of i + 1."""
    if len(inertias) < 3:
        return len(inertias)
    return int(np.argmax(np.diff(inertias, n=2))) + 2


def k_means(points: np.ndarray, num: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Clusters points f64[P, F]: the best of a few trials from k-means++ starts.

    Returns:
        i[P], the cluster of each point, which is the one with the nearest center; f64[C, F] centers, the means of their
        points; the inertia, the sum of squared distances. C is `num`, or less where fewer points differ; no cluster is
        empty.
    """
    rng = np.random.default_rng(seed)
    return min((_trial(points, num, rng) for _ in range(_TRIALS)), key=lambda trial: trial[2])


def _trial(points: np.ndarray, num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    centers = points[rng.integers(len(points))][None, :]
    while len(centers) < num and (far := _distances(points, centers).min(axis=1)).max() > 0:
        centers = np.concatenate([centers, points[rng.choice(len(points), p=far / far.sum())][None, :]])
    labels = np.full(len(points), -1)
    while (new := _distances(points, centers).argmin(axis=1)).tolist() != labels.tolist():
        used, labels = np.unique(new, return_inverse=True)
        centers = np.stack([points[new == cluster].mean(axis=0) for cluster in used])
    return labels, centers, float(_distances(points, centers).min(axis=1).sum())


def _distances(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Returns f64[P, C] squared distances."""
    return np.square(points[:, None, :] - centers[None, :, :]).sum(axis=2)
