"""An adapter as a few pure functions: a frozen kernel W and a trained correction of low rank, W' + scale * a core b.

Every method here has that form; they differ in which factors are trained, in how these start, and in one hook of the
optimiser. So a method says how its factors come to be (`Adapter`), and `attach`, `merge` and `count` serve all of them:

    kernels = select(params, ("q", "v"))                    # {path: f[I, O]}
    frozen, trainable = adapter.init(key, kernels, None)    # {path: {name: array}}
    base = rebase(adapter, params, frozen)                  # params, but for methods that start from a residual
    loss(attach(adapter, base, frozen, trainable))          # differentiate in `trainable` alone
    merge(adapter, base, frozen, trainable)                 # dense params again

Axis letters: I input features, O output features, R rank.
"""

import difflib
import fnmatch
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from models.errors import InputError
from models.kernels import LowRank

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")  # every linear layer of a block, by name
Kernels = Mapping[str, jax.Array]  # by the path of the layer: "layers_0/attention/q"
Values = dict[str, dict[str, jax.Array]]  # {path: {name: array}}


class Factors(NamedTuple):
    """One module's correction, scale * a core b: a [I, R], core [R, R] or [R] (diagonal) or None, b [R, O]."""

    a: jax.Array
    core: jax.Array | None
    b: jax.Array
    scale: float


def _same_kernel(kernel: jax.Array, frozen: Mapping[str, jax.Array]) -> jax.Array:
    return kernel


def _no_hook(inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    return inner


def _all_move(trainable: Values, steps: int) -> int:
    return count(trainable) * steps


def _same_values(frozen: Values, trainable: Values) -> tuple[Values, Values]:
    return frozen, trainable


class Adapter(NamedTuple):
    """A method, made by its file's factory from its config.

    Attributes:
        init: (key, kernels, gradients) -> (frozen, trainable), once, outside jit. `gradients` has the shape of kernels:
            the gradient of the training loss at the start, or None where `needs_gradients` is False. Modules draw from
            `module_key`, so that what one module gets does not depend on which others are chosen.
        factors: (frozen, trainable, shape) of one module -> Factors; pure, inside the loss. `shape` is (I, O) of its
            kernel, for methods whose values do not tell it.
        rebase: (kernel, frozen) of one module -> the kernel that the correction is added to.
        hook: (optimiser, steps of the whole run) -> optimiser, for methods that do more than descend.
        finish: (frozen, trainable) -> the same after training, for methods that end smaller than they began; they are
            read by the same `factors`, and a module that they no longer hold is the model's own.
        moved: (trainable, steps of the whole run) -> how many numbers its updates move, all of them together.
        needs_gradients: whether `init` wants gradients.
        no_decay: names of trained values that weight decay must leave alone.
        together: whether layers of equal shapes go through `factors` in one call under `vmap`, on stacked copies of
            their values: for methods with small values and much to compile.
    """

    init: Callable[[jax.Array, Kernels, Kernels | None], tuple[Values, Values]]
    factors: Callable[[Mapping[str, jax.Array], Mapping[str, jax.Array], tuple[int, int]], Factors]
    rebase: Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array] = _same_kernel
    hook: Callable[[optax.GradientTransformation, int], optax.GradientTransformation] = _no_hook
    finish: Callable[[Values, Values], tuple[Values, Values]] = _same_values
    moved: Callable[[Values, int], int] = _all_move
    needs_gradients: bool = False
    no_decay: frozenset[str] = frozenset()
    together: bool = False


def select(params: Any, targets: Sequence[str]) -> dict[str, jax.Array]:
    """Returns {path: kernel} of the linear layers that targets name.

    Args:
        params: a model's parameters.
        targets: each the last part of a path ("q"), or a pattern with * for a whole path ("layers_2*/attention/*").

    Raises:
        InputError: a target that names no linear layer.
    """
    paths = {path.removesuffix("/kernel"): path for path in flatten_dict(params, sep="/") if path.endswith("/kernel")}
    kernels = flatten_dict(params, sep="/")
    chosen: dict[str, jax.Array] = {}
    for target in targets:
        found = [path for path in paths if fnmatch.fnmatchcase(path if "/" in target else path.split("/")[-1], target)]
        if not found:
            raise _no_match(target, paths)
        chosen |= {path: kernels[paths[path]] for path in found}
    return {path: chosen[path] for path in paths if path in chosen}


def module_key(key: jax.Array, path: str) -> jax.Array:
    """Returns a key of one module: the same whatever other modules there are, in every process and version."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def replace_kernels(params: Any, kernels: Mapping[str, Any]) -> Any:
    """Returns params with the kernels at these paths replaced; the others are shared."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict(flat | {f"{path}/kernel": kernel for path, kernel in kernels.items()}, sep="/")


def rebase(adapter: Adapter, params: Any, frozen: Values) -> Any:
    """Returns the parameters that the corrections are added to: a function of the model's own and of `frozen`."""
    kernels = flatten_dict(params, sep="/")
    return replace_kernels(params, {path: adapter.rebase(kernels[f"{path}/kernel"], frozen[path]) for path in frozen})


def attach(adapter: Adapter, base: Any, frozen: Values, trainable: Values) -> Any:
    """Returns base with `LowRank` kernels in the adapted layers; cheap and pure."""
    flat = flatten_dict(base, sep="/")
    kernels = {path: flat[f"{path}/kernel"] for path in trainable}
    values = {path: (frozen.get(path, {}), trainable[path]) for path in trainable}
    if adapter.together:
        factors = _factors_together(adapter, kernels, values)
    else:
        factors = {path: adapter.factors(*values[path], kernels[path].shape) for path in trainable}
    return replace_kernels(base, {path: LowRank(kernels[path], *factors[path]) for path in trainable})


def merge(adapter: Adapter, base: Any, frozen: Values, trainable: Values) -> Any:
    """Returns dense parameters with the corrections added in float32: structure and dtypes of the model's own."""
    kernels = flatten_dict(attach(adapter, base, frozen, trainable), sep="/")
    return replace_kernels(base, {path: kernels[f"{path}/kernel"].materialize() for path in trainable})


def count(values: Any) -> int:
    """Returns how many numbers a tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(values))


def check_rank(rank: int, kernels: Kernels) -> None:
    """Raises InputError where a rank is above what a kernel can have."""
    for path, kernel in kernels.items():
        if rank > min(kernel.shape):
            raise InputError(
                f"rank {rank} is larger than the smaller side of {path}, {kernel.shape[0]} by {kernel.shape[1]}; "
                f"take a rank of at most {min(kernel.shape)} or leave the layer out of the targets"
            )


def _factors_together(adapter: Adapter, kernels: Kernels, values: Mapping[str, Any]) -> dict[str, Factors]:
    """Returns {path: factors}, of one call per shape of kernels and values."""
    groups: dict[Any, list[str]] = {}
    for path, kernel in kernels.items():
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(values[path]))
        groups.setdefault((kernel.shape, shapes), []).append(path)
    factors = {}
    for (shape, _), paths in groups.items():
        scales = []

        def arrays(frozen, trainable, shape=shape, scales=scales):
            made = adapter.factors(frozen, trainable, shape)
            scales.append(made.scale)
            return made.a, made.core, made.b

        stacked = jax.vmap(arrays)(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *(values[path] for path in paths)))
        for index, path in enumerate(paths):
            factors[path] = Factors(*jax.tree.map(lambda stack, index=index: stack[index], stacked), scales[0])
    return factors


def _no_match(target: str, paths: Mapping[str, str]) -> InputError:
    names = sorted({path.split("/")[-1] for path in paths})
    near = difflib.get_close_matches(target, [*names, *paths], n=4, cutoff=0.4)
    hint = f" Near matches: {', '.join(near)}." if near else ""
    return InputError(
        f"the target {target!r} matches no linear layer.{hint} Name layers ({', '.join(names)}) or paths with *, such "
        "as 'layers_0/attention/*'."
    )
