"""The gradient of the training loss in whole kernels, summed over a few batches: what LoRA-SB starts from.

Memory is twice the chosen kernels in float32. Where that is too much, call it for some of the kernels at a time.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from finetune.adapters.adapter import Kernels, replace_kernels
from finetune.objectives import Objective
from finetune.state import Batch
from finetune.trainer import summed_loss
from models.encoder_decoder import Network
from models.errors import InputError


def sum_gradients(
    model: Network,
    objective: Objective,
    params: Any,
    kernels: Kernels,
    batches: Iterable[Batch],
    mesh: Mesh | None = None,
) -> dict[str, jax.Array]:
    """Sums dL/dW over batches, with L the objective added up over the tokens that training would predict.

    Args:
        model: the network.
        objective: what training minimises.
        params: the model's parameters before training.
        kernels: those to differentiate in, as `finetune.adapters.adapter.select` gives them.
        batches: of one shape; gone through once, a micro-batch at a time.
        mesh: of devices that rows are spread over.

    Returns:
        {path: f32[I, O]}, the paths of `kernels`.

    Raises:
        InputError: the batches hold no token to predict, or the gradient is not finite.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total, kernels, params, constants, batch):
        def loss(kernels, part):
            value, figures = summed_loss(model, objective, replace_kernels(params, kernels), constants, part, mesh=mesh)
            return value, figures["tokens"]

        def step(total, part):
            found = jax.grad(loss, has_aux=True)(kernels, part)
            return jax.tree.map(lambda old, new: old + new.astype(jnp.float32), total, found), None

        return jax.lax.scan(step, total, batch)[0]

    kernels = dict(kernels)
    total = (jax.tree.map(lambda kernel: jnp.zeros_like(kernel, jnp.float32), kernels), jnp.zeros((), jnp.float32))
    for batch in batches:
        total = add(total, kernels, params, objective.constants, batch)
    gradients, tokens = total
    if not tokens > 0:
        raise InputError("the batches of the gradient pass hold no token to predict; give it more of them")
    for path, gradient in gradients.items():
        if not jnp.isfinite(gradient).all():
            raise InputError(f"the gradient of the loss in {path} is not finite before training; check the data")
    return gradients
