"""New models: a small llama-type network, or one with an encoder, with random weights, for training from scratch."""

import dataclasses
from typing import Literal

from models.config import (
    Activation,
    AttentionConfig,
    BlockConfig,
    DecoderConfig,
    EncoderDecoderConfig,
    MLPConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
)
from models.encoder_decoder import Network, network
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Experts in place of an MLP of width F, with as many parameters at work on a token as it has.

    Attributes:
        num: experts E.
        active: K, how many a token goes to; each is F / K wide.
        router: `learned` or `sparsity` (`models.config.MoEConfig`).
        router_gradient: whether losses reach the experts through the scores of a sparsity router.
        form: how they are computed (`models.moe`); in training on a CPU, where a batch goes to all of them, `dense` is
            the fastest.
        balance_weight: of the balance loss in training.
        z_weight: of the router's z-loss in training.
    """

    num: int = 8
    active: int = 2
    router: Literal["learned", "sparsity"] = "learned"
    router_gradient: bool = True
    form: Literal["dense", "capacity", "ragged", "loop"] | None = None
    balance_weight: float = 0.01
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.num:
            raise InputError(f"active must be 1 to num, {self.num} experts; got {self.active}")
        if not (self.balance_weight >= 0 and self.z_weight >= 0):
            raise InputError(
                f"balance_weight and z_weight must not be negative, got {self.balance_weight} and {self.z_weight}"
            )

    def instead_of(self, mlp: MLPConfig) -> MoEConfig:
        """Returns the mixture that stands for an MLP; raises InputError where its width cannot be shared out."""
        if mlp.width % self.active:
            raise InputError(
                f"an MLP of width {mlp.width} cannot be shared by {self.active} active experts: not divisible"
            )
        return MoEConfig(
            self.num,
            self.active,
            dataclasses.replace(mlp, width=mlp.width // self.active),
            router=self.router,
            router_gradient=self.router_gradient,
            form=self.form,
            balance_weight=self.balance_weight,
            z_weight=self.z_weight,
        )


@dataclasses.dataclass(frozen=True)
class ScratchConfig:
    """A network's shape: RMSNorm, rotary positions, MLPs or mixtures of experts, embeddings tied to the output.

    Attributes:
        layers: L; of a model with an encoder, those of the decoder.
        width: D.
        heads: query heads H, each D / H wide.
        kv_heads: key/value heads K.
        mlp_width: F, of the MLP or of a token's experts together.
        activation: of the MLP or the experts.
        gated: whether these are gated.
        bias: whether linear layers have biases.
        experts: in place of each MLP; None: there are none.
        max_length: tokens; the longest context, and the longest text that an encoder reads.
        tokenizer: "bytes", "stories" (a word each, of the stories that code writes), "othello" (its moves), "code"
            (`finetune.code_tokenizer`: pairs of texts and functions), or a model (a name or a path) whose tokenizer is
            used.
        encoder_layers: of an encoder that reads prompts; 0: a decoder-only model.
        embedding_width: E of a vector for each text that an encoder reads; null: there is none.
        matching: whether there is a head that tells whether two texts belong together; needs an encoder.
    """

    layers: int = 6
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 768
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    experts: ExpertsConfig | None = None
    max_length: int = 512
    tokenizer: str = "bytes"
    encoder_layers: int = 0
    embedding_width: int | None = None
    matching: bool = False

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.kv_heads, self.mlp_width, self.max_length) < 1:
            raise InputError("layers, width, heads, kv_heads, mlp_width and max_length must be at least 1")
        if self.encoder_layers < 0:
            raise InputError(f"encoder_layers must not be negative (0: no encoder), got {self.encoder_layers}")
        if not self.encoder_layers and (self.embedding_width is not None or self.matching):
            raise InputError("embedding_width and matching are of models with an encoder: set encoder_layers")
        if self.embedding_width is not None and self.embedding_width < 1:
            raise InputError(f"embedding_width must be at least 1 (or null for none), got {self.embedding_width}")
        if self.width % (2 * self.heads):
            raise InputError(f"width {self.width} must be a multiple of twice the heads, {self.heads}")
        feed_forward(self)


def feed_forward(config: ScratchConfig) -> MLPConfig | MoEConfig:
    """Returns what stands behind each attention; raises InputError for experts that cannot be."""
    mlp = MLPConfig(config.mlp_width, config.activation, config.gated, config.bias)
    return mlp if config.experts is None else config.experts.instead_of(mlp)


def scratch_model(config: ScratchConfig, vocab_size: int) -> Network:
    """Returns the network for a vocabulary; what the decoder of one with an encoder writes begins with token 0."""
    attention = AttentionConfig(
        config.heads, config.kv_heads, config.width // config.heads, config.bias, config.bias, rope=RopeConfig()
    )
    norm = NormConfig("rms", 1e-5)
    block = BlockConfig(attention, feed_forward(config), norm)

    def stack(blocks: tuple[BlockConfig, ...]) -> DecoderConfig:
        return DecoderConfig("llama", vocab_size, config.width, blocks, config.max_length, norm, tied_embeddings=True)

    if not config.encoder_layers:
        return network(stack((block,) * config.layers))
    cross = dataclasses.replace(block, cross=dataclasses.replace(attention, rope=None))
    encoder, decoder = stack((block,) * config.encoder_layers), stack((cross,) * config.layers)
    heads = {"embedding_width": config.embedding_width, "matching": config.matching}
    return network(EncoderDecoderConfig(encoder, decoder, **heads))
