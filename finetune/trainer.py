"""One jitted update for every method and objective, and the loop around it.

Axis letters: A micro-batches of an update, B rows, T tokens of a row, N tokens of a micro-batch, D width, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from finetune.objectives import BatchObjective, Objective
from finetune.reading import read_batch
from finetune.state import Batch, Constants, Method, TrainState
from models.encoder_decoder import Network, writing_stack
from models.errors import InputError
from models.sharding import keep_split, num_row_shards

Metrics = dict[str, jax.Array]
LOSS_CHUNK = 256  # tokens whose logits exist at a time


def summed_loss(
    model: Network,
    objective: Objective,
    params: Any,
    constants: Any,
    batch: Batch,
    chunk: int = LOSS_CHUNK,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Metrics]:
    """Sums an objective over the tokens of a micro-batch that are to be predicted.

    Losses of routers (`models.router_losses`) are means over a micro-batch; each of those tokens adds them once.

    Args:
        model: the network.
        objective: what is summed.
        params: of the model; kernels may be of any kind.
        constants: the objective's.
        batch: [B, T] each.
        chunk: tokens whose logits exist at a time, on each device that rows are spread over.
        mesh: of devices that rows are spread over.

    Returns:
        (sum f32[], {name: sum of each further figure; `tokens`: how many were predicted}).
    """
    if objective.total is not None:
        return objective.total(model, params, constants, batch)
    x, routing = read_batch(model, params, batch, mesh)
    context = objective.context(constants, batch)
    wanted = batch.targets[:, 1:] & (batch.segments[:, 1:] == batch.segments[:, :-1])
    x, context = jax.tree.map(lambda value: value[:, :-1], (x, jax.lax.stop_gradient(context)))
    rows_here = wanted.shape[0] // (1 if mesh is None else num_row_shards(mesh))
    width = min(wanted.shape[1], max(1, chunk // rows_here))
    x, *rest = columns((x, context, batch.tokens[:, 1:], wanted), width)

    def of(head, x, rest):
        x, context, labels, wanted = jax.tree.map(lambda value: value.reshape(-1, *value.shape[2:]), (x, *rest))
        logits = writing.apply({"params": head}, x, method="unembed")
        value, figures = objective.per_token(logits, labels, constants, context)
        kept = jax.tree.map(lambda figure: jnp.sum(jnp.where(wanted, figure, 0.0)), figures | {"objective": value})
        return kept.pop("objective"), kept

    writing, head = writing_stack(model, params)
    head = {name: value for name, value in head.items() if not name.startswith("layers_")}
    total, figures = sum_over_chunks(of, head, x, tuple(rest))
    tokens = jnp.sum(wanted).astype(jnp.float32)
    routing = {name: value * tokens for name, value in routing.items()}
    return sum(routing.values(), total), figures | routing | {"tokens": tokens}


def sum_over_chunks(of: Callable[..., Any], head: Any, x: jax.Array, rest: Any) -> tuple[jax.Array, Metrics]:
    """Adds up (value, figures) = of(head, chunk of x, chunk of rest), one chunk at a time.

    The gradient of the value in head and x is taken on the way, while a chunk's logits exist: a backward pass would
    have to keep them, or to make them again. That in head is added up in float32. Figures have no gradient.
    """
    floats = jax.tree.map(lambda value: value if jnp.issubdtype(value.dtype, jnp.floating) else None, head)

    def sums(floats, x, rest):
        whole = jax.tree.map(lambda a, b: b if a is None else a, floats, head, is_leaf=lambda value: value is None)
        return of(whole, x, rest)

    @jax.custom_vjp
    def total(floats, x):
        return _summed(jax.lax.map(lambda chunk: sums(floats, *chunk), (x, rest)))

    def forward(floats, x):
        def one(in_floats, chunk):
            found, (more, in_x) = jax.value_and_grad(sums, argnums=(0, 1), has_aux=True)(floats, *chunk)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), in_floats, more), (found, in_x)

        zeros = jax.tree.map(lambda value: jnp.zeros(value.shape, jnp.float32), floats)
        in_floats, (found, in_x) = jax.lax.scan(one, zeros, (x, rest))
        in_floats = jax.tree.map(lambda value, like: value.astype(like.dtype), in_floats, floats)
        return _summed(found), (in_floats, in_x)

    def backward(gradients, cotangents):
        return jax.tree.map(lambda value: value * cotangents[0].astype(value.dtype), gradients)

    total.defvjp(forward, backward)
    return total(floats, x)


def _summed(rows: Any) -> Any:
    return jax.tree.map(lambda value: jnp.sum(value, axis=0), rows)


def columns(tree: Any, width: int) -> Any:
    """Cuts [B, T, ...] into [chunks, B, width, ...], zeros behind the last token: rows stay on their devices."""

    def cut(value):
        value = jnp.pad(value, [(0, 0), (0, -value.shape[1] % width)] + [(0, 0)] * (value.ndim - 2))
        return jnp.moveaxis(value.reshape(value.shape[0], -1, width, *value.shape[2:]), 1, 0)

    return jax.tree.map(cut, tree)


def make_train_step(
    model: Network,
    objective: Objective | BatchObjective,
    method: Method,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Constants, Batch], tuple[TrainState, Metrics]]:
    """Returns the jitted update (state, constants, batch) -> (state, metrics); the old state's buffers are given up.

    The gradient is that of the mean over all tokens of the batch that are to be predicted, however they are spread over
    its micro-batches; of a `BatchObjective` that of its mean over the batch. Metrics are f32[]: loss, the objective's
    further figures, grad_norm (before clipping), learning_rate, tokens (predicted).
    """
    gradient = (
        _whole_gradient(objective, method)
        if isinstance(objective, BatchObjective)
        else _mean_gradient(model, objective, method, mesh)
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, constants: Constants, batch: Any) -> tuple[TrainState, Metrics]:
        grads, metrics, left = gradient(state, constants, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to counts
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
            rate = jnp.asarray(schedule(state.step), jnp.float32)
        trainable, own = optax.apply_updates(state.trainable, updates), state.own
        if isinstance(objective, BatchObjective):
            own = objective.follow(own, method.attach(constants.base, constants.frozen, trainable), left)
        metrics |= {"grad_norm": optax.tree_utils.tree_norm(grads), "learning_rate": rate}
        return keep_split(TrainState(state.step + 1, trainable, opt_state, own), mesh), metrics

    return train_step


def _mean_gradient(model: Network, objective: Objective, method: Method, mesh: Mesh | None) -> Callable[..., Any]:
    """Returns (state, constants, batch) -> (gradient, metrics, nothing) of the mean over a batch's tokens."""

    def of_part(trainable, constants, batch):
        def of(trainable):
            params = method.attach(constants.base, constants.frozen, trainable)
            rows = objective.training_rows(jax.lax.stop_gradient(params), batch)
            return summed_loss(model, objective, params, constants.objective, rows, mesh=mesh)

        (loss, figures), grads = jax.value_and_grad(of, has_aux=True)(trainable)
        return grads, figures | {"loss": loss}

    def gradient(state, constants, batch):
        grads, sums = _added(lambda part: of_part(state.trainable, constants, part), batch)
        tokens = jnp.maximum(sums.pop("tokens"), 1.0)
        grads, metrics = jax.tree.map(lambda value: value / tokens.astype(value.dtype), (grads, sums))
        return grads, metrics | {"tokens": tokens}, None

    return gradient


def _whole_gradient(objective: BatchObjective, method: Method) -> Callable[..., Any]:
    """Returns (state, constants, batch) -> (gradient, metrics, what the objective has left) of a whole batch's loss."""

    def gradient(state, constants, batch):
        whole = jax.tree.map(lambda value: value[0], batch)

        def of(trainable):
            params = method.attach(constants.base, constants.frozen, trainable)
            loss, figures, left = objective.loss(params, state.own, whole)
            return loss, (figures | {"loss": loss}, left)

        (_, (metrics, left)), grads = jax.value_and_grad(of, has_aux=True)(state.trainable)
        return grads, metrics, left

    return gradient


def make_eval_step(
    model: Network, objective: Objective, method: Method, mesh: Mesh | None = None
) -> Callable[[Any, Constants, Batch], Metrics]:
    """Returns the jitted function (trainable, constants, batch) -> {loss and figures summed over tokens, tokens}."""

    @jax.jit
    def eval_step(trainable: Any, constants: Constants, batch: Batch) -> Metrics:
        params = method.attach(constants.base, constants.frozen, trainable)

        def of(part):
            loss, figures = summed_loss(model, objective, params, constants.objective, part, mesh=mesh)
            return figures | {"loss": loss}

        return _added(of, batch)

    return eval_step


def _added(of: Callable[[Batch], Any], batch: Batch) -> Any:
    """Returns the sum of a function's values over the micro-batches, one after another."""
    if batch.tokens.shape[0] == 1:
        return of(jax.tree.map(lambda value: value[0], batch))
    shapes = jax.eval_shape(of, jax.tree.map(lambda value: value[0], batch))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, of(part)), None), zeros, batch)[0]


class NotFinite(InputError):
    """The loss or the gradient of an update is not a finite number."""


class Hook(NamedTuple):
    """Something done every so many updates and after the last one: `run(step, state)`.

    The state is only good until `run` returns.
    """

    every: int
    run: Callable[[int, TrainState], None]


def train(
    train_step: Callable[[TrainState, Constants, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    constants: Constants,
    batches: Callable[[int], Batch],
    steps: int,
    report: Callable[[int, dict[str, float]], None],
    hooks: Sequence[Hook] = (),
) -> TrainState:
    """Makes updates until `steps` have been made in all.

    The host reads the metrics of an update after it has dispatched the next one, so that the device never waits for it.

    Args:
        train_step: of `make_train_step`.
        state: where to start from; its buffers are given up.
        constants: what updates read.
        batches: the batch of each update, by the number of updates before it.
        steps: updates in all, those that `state` has behind it included.
        report: called with (updates made, metrics) for each, in order.
        hooks: called after the reports of all updates so far.

    Returns:
        The last state.

    Raises:
        NotFinite: the loss or the gradient is not finite; no hook has seen a state that came of it.
    """
    pending: tuple[int, Metrics] | None = None

    def settle() -> None:
        nonlocal pending
        if pending is not None:
            step, metrics = pending[0], {name: float(value) for name, value in pending[1].items()}
            pending = None
            _check_finite(step, metrics)
            report(step, metrics)

    for step in range(int(state.step), steps):
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = train_step(state, constants, batches(step))
        settle()
        pending = (step + 1, metrics)
        due = [hook for hook in hooks if (step + 1) % hook.every == 0 or step + 1 == steps]
        if due:
            settle()
        for hook in due:
            hook.run(step + 1, state)
    settle()
    return state


def _check_finite(step: int, metrics: dict[str, float]) -> None:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise NotFinite(f"the {name.replace('_', ' ')} of update {step} is {metrics[name]}")
