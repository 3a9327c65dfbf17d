"""Medusa: independent heads on the last hidden state, one per offset, and a static tree of their best guesses.

Source: "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads" (2401.10774), section 2.1
(heads), 2.1.2 (tree) and 2.3.3 (the tree from calibration). f is the target's last hidden state under the final norm;
head k maps it to what the unembedding turns into guesses k + 2 tokens ahead:

    block   f + SiLU(W f + b), W and b zero at first: each head then ranks as the target itself does
    mlp     f + U SiLU(W f + b), W of twice the width, U zero at first: more is learned from little text

Deviations: the released heads each train a copy U_k of the unembedding; here all share the target's own, frozen (the
released code's first form), as a copy has V * D numbers. Acceptance is exact (greedy) or keeps the target's law; the
paper's own, `acceptance: typical`, is an option of every head.

Axis letters: B batch, K offsets, D model width.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from decoding.method import Method, Steps, WithDraft
from decoding.speculative.draft_head import HeadKind, HeadOptions, Reading, make_parallel, normed
from decoding.speculative.drafter import Round
from models.decoder import Decoder
from models.errors import InputError, unknown_name
from models.kernels import PRECISION


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """The heads: how many offsets, and what each of them is."""

    type: Literal["medusa"] = "medusa"
    offsets: int = 3
    form: Literal["block", "mlp"] = "mlp"

    def __post_init__(self) -> None:
        if self.offsets < 1:
            raise InputError(f"offsets must be at least 1, got {self.offsets}")
        if self.form not in ("block", "mlp"):
            raise unknown_name("form of Medusa's heads", self.form, ("block", "mlp"))


@dataclasses.dataclass(frozen=True)
class MedusaOptions(HeadOptions):
    """Head and tree."""

    head: Any = MedusaConfig()


class MedusaHeads(nn.Module):
    """f [..., D] -> f32[..., K, D]; all offsets in one product."""

    config: MedusaConfig

    @nn.compact
    def __call__(self, f: jax.Array) -> jax.Array:
        """Maps the hidden state to what the unembedding reads."""
        count, width, mlp = self.config.offsets, f.shape[-1], self.config.form == "mlp"
        inner = 2 * width if mlp else width
        start = nn.initializers.normal(width**-0.5) if mlp else nn.initializers.zeros
        kernel = self.param("kernel", start, (count, width, inner))
        bias = self.param("bias", nn.initializers.zeros, (count, inner))
        x = jnp.einsum("...d,kdf->...kf", f, kernel, precision=PRECISION)
        x = nn.silu(x + bias.reshape(*(1,) * (x.ndim - 2), count, inner))
        if mlp:
            out = self.param("out", nn.initializers.zeros, (count, inner, width))
            x = jnp.einsum("...kf,kfd->...kd", x, out, precision=PRECISION)
        return f[..., None, :] + x


def _streams(config: MedusaConfig, model: Decoder) -> tuple[int, ...]:
    return (model.config.num_layers,)


def _init(config: MedusaConfig, model: Decoder, params: Any, key: jax.Array) -> Any:
    return MedusaHeads(config).init(key, jnp.zeros((1, model.config.width), jnp.float32))["params"]


def _guesses(config: MedusaConfig, model: Decoder, params: Any, values: Any, reading: Reading) -> jax.Array:
    f = normed(model, params, reading.hidden[model.config.num_layers])
    return MedusaHeads(config).apply({"params": values}, f)


MEDUSA_HEAD = HeadKind(MedusaConfig, _streams, _init, _guesses)


def make_medusa(model: Decoder, options: MedusaOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts the calibrated tree of `options.nodes` guesses."""

    def guess(params: WithDraft, kept: dict[int, jax.Array], round_: Round, depth: int) -> jax.Array:
        f = normed(model, params.target, kept[model.config.num_layers])
        return MedusaHeads(options.head).apply({"params": params.draft}, f)[:, :depth]

    return make_parallel(MEDUSA_HEAD, model, options, stop_tokens, guess)


MEDUSA = Method("exact", MedusaOptions, make_medusa, temperature=0.0, head=True)
