"""A head on a draft model that predicts whether the token it has just read will be accepted, and the head's file.

Source: SpecDec++ (2405.19715). One file for decoding and training, so that both read the same hidden state: the draft's
last one, after the final norm, in float32.

Axis letters: B batch, T query length, N places, D the draft's width, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.cache import KVCache
from models.decoder import Decoder, next_positions
from models.errors import InputError
from models.head_file import read_head, write_head
from models.layers import Linear

_KIND = "acceptance_head"


class AcceptanceHead(nn.Module):
    """x <- x + SiLU(W x + b), `depth` times, then two logits: rejected, accepted.

    All blocks share W and b, as in the released code: the head has D * D + 3 * D + 2 parameters whatever its depth.
    Weights start as this project's linear layers do; the released code starts with torch's default.
    """

    depth: int = 3

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden states [..., D] to logits f32[..., 2]."""
        x = hidden.astype(jnp.float32)
        block = Linear(x.shape[-1], use_bias=True, name="block")
        for _ in range(self.depth):
            x = x + nn.silu(block(x))
        return Linear(2, use_bias=True, name="out")(x)


def log_accept(logits: jax.Array) -> jax.Array:
    """Returns the log-probability of acceptance, f32[...], of a head's logits f32[..., 2]."""
    return jax.nn.log_softmax(logits, axis=-1)[..., 1]


def read_hidden(
    module: Decoder, tokens: jax.Array, cache: KVCache | None = None, places: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, KVCache | None]:
    """A forward pass that also gives what a head reads: `draft.apply(variables, ..., method=read_hidden)`.

    Args:
        module: the bound model.
        tokens: i32[B, T].
        cache: what comes before them, or None.
        places: i32[B, N], which of the T tokens to answer for; None: all of them.

    Returns:
        (logits f32[B, N, V], hidden f32[B, N, D] after the final norm, cache).
    """
    positions = next_positions(tokens, cache)
    x, _, cache, _ = module.layers(module.embed(tokens, positions), positions, cache)
    if places is not None:
        x = jnp.take_along_axis(x, places[..., None], axis=1)
    return module.unembed(x), module.final_norm(x).astype(jnp.float32), cache


def save_head(path: Path, params: Mapping[str, Any], *, draft: str, depth: int, facts: Mapping[str, str]) -> None:
    """Writes a head as safetensors; the file is whole or not there at all.

    Args:
        path: the file; its folder is made.
        params: of `AcceptanceHead(depth)`.
        draft: the draft model's name or path; a file or folder goes by its own name.
        depth: of the head.
        facts: what else the file's metadata is to say.

    Raises:
        InputError: the file cannot be written.
    """
    write_head(path, _KIND, params, {**facts, "draft": Path(draft).name, "depth": str(depth)})


def load_head(path: Path, draft: str, width: int, target: str | None = None) -> tuple[dict[str, Any], int]:
    """Returns a head's parameters and depth.

    Args:
        path: a file of `save_head`.
        draft: the name or path of the draft model that is to use it.
        width: D of that model.
        target: the name or path of the model that it drafts for; None: any.

    Raises:
        InputError: no such file, one that holds no head, or the head of another draft or target.
    """
    main = "experiments.train_acceptance_head"
    params, facts = read_head(path, _KIND, main, f"--draft {draft} --out {path}")
    if facts["draft"] != Path(draft).name:
        raise InputError(
            f"{path} is a head for draft {facts['draft']!r}, not for {Path(draft).name!r}: train one for this draft"
        )
    if target is not None and facts.get("target", Path(target).name) != Path(target).name:
        raise InputError(
            f"{path} is a head for target {facts['target']!r}, not for {Path(target).name!r}: train one for this "
            "target, or remove the file"
        )
    depth = int(facts["depth"])
    fresh = jax.eval_shape(AcceptanceHead(depth).init, jax.random.key(0), jax.ShapeDtypeStruct((1, width), jnp.float32))
    wanted, found = (jax.tree.map(jnp.shape, tree) for tree in (fresh["params"], params))
    if found != wanted:
        raise InputError(f"{path} does not fit a draft of width {width}: wanted {wanted}, got {found}")
    return params, depth
