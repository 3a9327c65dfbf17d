"""What a model is made of, as frozen (hashable) dataclasses: one per architecture part.

A `DecoderConfig` lists its blocks one by one, so layers that differ (Gemma's local and global attention, streaming
heads, mixed experts) need no special field: they are different entries of `blocks`.
"""

import dataclasses
from typing import Any, Literal

import pydantic

from models.errors import InputError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched to reach beyond the length a model was trained on.

    Attributes:
        kind: `linear` divides every frequency by `factor`; `llama3` divides the low ones and blends in between (Llama
            3.1 report, section 3.2.1 and its released code); `yarn` blends by rotations per original length (YaRN,
            2309.00071, section 3.2).
        factor: how many times longer the context becomes, >= 1.
        original_length: tokens; the context the model was trained on (llama3, yarn).
        low_frequency_factor: llama3; frequencies with fewer rotations per `original_length` are divided by `factor`.
        high_frequency_factor: llama3; frequencies with more rotations stay.
        beta_fast: yarn; dimensions with more rotations than this stay.
        beta_slow: yarn; dimensions with fewer rotations than this are divided by `factor`.
        attention_factor: yarn; multiplies cos and sin. None means 0.1 ln(factor) + 1 (YaRN, equation 22).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_length: int = 8192
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (RoFormer, 2104.09864): the base of the frequencies and how they are stretched."""

    theta: float = 10_000.0
    scaling: RopeScaling | None = None


@dataclasses.dataclass(frozen=True)
class RelativeConfig:
    """Learned biases on the scores by how far a key lies from its query (T5, 1910.10683, section 2.1).

    Distances fall into buckets: half of them hold one distance each, the others ever longer spans.

    Attributes:
        num_buckets: how many; for keys behind and ahead together.
        max_distance: tokens; from here on all share the last bucket.
        bidirectional: whether keys ahead of the query have buckets of their own; else they share that of distance 0.
    """

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """One attention layer.

    Attributes:
        num_heads: query heads H.
        num_kv_heads: key/value heads K; divides H.
        head_dim: Dh.
        qkv_bias: whether q, k and v have biases.
        out_bias: whether the output projection has one.
        qk_norm: whether q and k pass an RMSNorm before the rotation, over each head's Dh or, "joint", over all heads.
        rope: rotary positions, or None (learned positions, or none at all).
        relative: biases by distance, one table for all layers of a stack, or None.
        scale: factor on q k^T; None means Dh ** -0.5.
        window: a query sees the last `window` positions, itself included; None means all.
        softcap: scores become softcap * tanh(scores / softcap); None means no cap.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool | Literal["joint"] = False
    rope: RopeConfig | None = RopeConfig()
    relative: RelativeConfig | None = None
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise InputError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.rope is not None and self.head_dim % 2:
            raise InputError(f"rotary positions need an even head_dim, got {self.head_dim}")


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """One feed-forward layer of width F: down(act(gate x) * up x) when gated, down(act(up x)) when not."""

    width: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Experts in place of an MLP (`models.moe`).

    Attributes:
        num_experts: E.
        top_k: K, how many of them a token goes to.
        expert: the shape of each.
        normalise: whether the weights of a token's K experts add up to one.
        shared: an expert that every token goes to, times a sigmoid gate; None: there is none.
        router: `learned`, a linear layer; or `sparsity`, by how few neurons of an expert are expected to fire (MoE-X:
            to have an input above zero, whatever the activation).
        router_gradient: of the sparsity router, whether losses reach the experts' weights through its scores, which
            makes experts sparser where they are chosen.
        form: how it is computed (`models.moe`); None: what is fastest on this kind of device.
        capacity_factor: in the form `capacity`, rows of an expert's buffer over N K / E; E / K has room for all.
        balance_weight: of the balance loss in training.
        z_weight: of the z-loss of the router in training.
    """

    num_experts: int
    top_k: int
    expert: MLPConfig
    normalise: bool = True
    shared: MLPConfig | None = None
    router: Literal["learned", "sparsity"] = "learned"
    router_gradient: bool = True
    form: Literal["dense", "capacity", "ragged", "loop"] | None = None
    capacity_factor: float = 1.25
    balance_weight: float = 0.01
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise InputError(f"top_k must be 1 to num_experts, {self.num_experts}; got {self.top_k}")
        if self.expert.bias:
            raise InputError("experts have no biases here: leave out expert.bias")
        if self.router == "sparsity" and self.expert.gated:
            raise InputError(
                "the sparsity router counts neurons whose input is above zero, and a gated one has two: set gated to "
                "false, or router to learned"
            )


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """RMSNorm (`rms`) or LayerNorm with bias (`layer`)."""

    kind: Literal["rms", "layer"] = "rms"
    epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One pre-norm transformer block.

    `post_norms` adds a norm at the end of each branch (Gemma 2 and 3), `cross` a branch between attention and MLP that
    attends to what an encoder has read, and `cross_gate` a learned factor on that branch, 0 at first.
    """

    attention: AttentionConfig
    mlp: MLPConfig | MoEConfig
    norm: NormConfig = NormConfig()
    post_norms: bool = False
    cross: AttentionConfig | None = None
    cross_gate: bool = False


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only model.

    Attributes:
        family: the architecture's name in `models.families`.
        vocab_size: V, rows of the embedding (may exceed the tokenizer's ids by padding rows).
        width: D.
        blocks: one entry per layer.
        max_length: tokens; the longest context the model was made for.
        norm: the final norm.
        tied_embeddings: whether the embedding also gives the logits.
        embedding_scale: factor on the embeddings (Gemma: sqrt(D)).
        learned_positions: whether a table of `max_length` learned positions is added to the embeddings (GPT-2).
        logit_softcap: logits become softcap * tanh(logits / softcap); None means no cap.
        logit_scale: factor on the logits (T5 with tied embeddings: D ** -0.5).
    """

    family: str
    vocab_size: int
    width: int
    blocks: tuple[BlockConfig, ...]
    max_length: int
    norm: NormConfig = NormConfig()
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    learned_positions: bool = False
    logit_softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def num_layers(self) -> int:
        """The number of blocks, L."""
        return len(self.blocks)


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """A model that reads a text with one stack and writes another with a second one that attends to it.

    Attributes:
        encoder: the stack that reads; its `max_length` is the longest text it takes.
        decoder: the stack that writes, with embeddings; some or all of its blocks have `cross`. Without any block the
            model reads only, and has nothing but the embeddings here.
        start_token: what the written text begins with (not part of it).
        own_embedding: whether the encoder has an embedding of its own; else it reads that of the decoder.
        embedding_width: E, of the vector that stands for a whole text; None: there is none.
        matching: whether there is a head that tells whether a written text fits the one that was read.
    """

    encoder: DecoderConfig
    decoder: DecoderConfig
    start_token: int = 0
    own_embedding: bool = False
    embedding_width: int | None = None
    matching: bool = False

    def __post_init__(self) -> None:
        if not self.own_embedding and self.encoder.width != self.decoder.width:
            raise InputError(
                f"an encoder of width {self.encoder.width} cannot read the embedding of a decoder of width "
                f"{self.decoder.width}: set own_embedding"
            )
        if self.reads_only and (self.matching or self.embedding_width is None):
            raise InputError("a model without a decoder's blocks needs an embedding_width, and cannot have matching")

    @property
    def reads_only(self) -> bool:
        """Whether there is an encoder alone."""
        return not self.decoder.blocks

    @property
    def family(self) -> str:
        """The architecture's name in `models.families`."""
        return self.decoder.family

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.decoder.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens of the longest text that is written, the start token included."""
        return self.decoder.max_length

    @property
    def tied_embeddings(self) -> bool:
        """Whether the embedding also gives the logits."""
        return self.decoder.tied_embeddings


ModelConfig = DecoderConfig | EncoderDecoderConfig


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Returns the config as plain JSON values; `config_from_dict` reads them back to an equal config."""
    return dataclasses.asdict(config)


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Reads what `config_to_dict` wrote; raises InputError for a field that is missing or of the wrong type."""
    kind = EncoderDecoderConfig if isinstance(values, dict) and "encoder" in values else DecoderConfig
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        found = error.errors()  # of a union: of each of its kinds, and what is merely missing may be another kind's
        first = next((problem for problem in found if problem["type"] != "missing"), found[0])
        path = ".".join(str(part) for part in first["loc"] if not str(part)[:1].isupper())
        raise InputError(f"model config: {path}: {first['msg']}, got {first['input']!r:.80}") from error
