"""How a model reads a batch: the one forward pass behind every objective, evaluation and gradient pass.

A decoder reads rows in which several texts may stand side by side. A model with an encoder reads a source beside each
row, and its decoder the row as any other decoder does; one with a compressor makes embeddings of a source, which stand
in the row's places of negative ids.

Axis letters: B rows, T tokens of a row, S tokens of a source, D width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from finetune.state import Batch
from models.attention import segment_attend
from models.decoder import Inserted
from models.dolphin import Dolphin
from models.encoder_decoder import EncoderDecoder, Network
from models.errors import InputError
from models.moe import ROUTING
from models.router_losses import router_losses
from models.sharding import keep_rows


def read_batch(
    model: Network, params: Any, batch: Batch, mesh: Mesh | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs a model's layers over a micro-batch.

    Args:
        model: the network.
        params: its parameters; kernels may be of any kind.
        batch: [B, T] each.
        mesh: of devices that rows are spread over.

    Returns:
        ([B, T, D], ready for `unembed`; the losses of the model's routers, if it has any).

    Raises:
        InputError: a source for a model without an encoder, or none for one with an encoder.
    """
    if isinstance(model, EncoderDecoder | Dolphin) != (batch.source is not None):
        raise InputError(
            f"the model {'has a compressor' if isinstance(model, Dolphin) else 'is an encoder-decoder'} "
            f"({model.config.family}) and the batch has no source: make its rows with finetune.rows.pair (with_context)"
            if batch.source is None
            else f"the batch has sources, and this {model.config.family} model has no encoder to read them: train an "
            "encoder-decoder, or put each source in front of its row"
        )
    x, left = model.apply({"params": params}, batch, mesh, method=_streams, mutable=[ROUTING])
    return x, _router_losses(model, left.get(ROUTING, {}), batch)


def _streams(module: Network, batch: Batch, mesh: Mesh | None) -> jax.Array:
    if isinstance(module, Dolphin):
        start = jnp.argmax(batch.tokens < 0, axis=1)
        memory = Inserted(module.compress(*batch.source), start.astype(batch.positions.dtype))
        x = keep_rows(module.embed(*memory.at(batch.tokens, batch.positions)), mesh)
        return module.layers(x, batch.positions, attend=segment_attend, ctx=batch.segments)[0]
    encoded = None
    if batch.source is not None:
        tokens, lengths = batch.source
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
        encoded = module.read(keep_rows(module.embed_source(tokens, places), mesh), lengths)
    x = keep_rows(module.embed(batch.tokens, batch.positions), mesh)
    return module.layers(x, batch.positions, attend=segment_attend, ctx=batch.segments, encoded=encoded)[0]


def _router_losses(model: Network, routing: Mapping[str, Any], batch: Batch) -> dict[str, jax.Array]:
    """Returns the losses of all routers; of an encoder-decoder, those of both stacks added up."""
    real = batch.segments > 0
    if isinstance(model, Dolphin):
        return router_losses(model.config.main, routing.get("main", {}), real)
    if batch.source is None:
        return router_losses(model.config, routing, real)
    found = router_losses(model.config.decoder, routing.get("decoder", {}), real)
    tokens, lengths = batch.source
    real = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
    for name, value in router_losses(model.config.encoder, routing.get("encoder", {}), real).items():
        found[name] = found.get(name, 0.0) + value
    return found
