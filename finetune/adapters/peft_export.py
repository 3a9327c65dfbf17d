"""Adapters for PEFT: any correction of low rank, folded into a plain LoRA.

PEFT adds (lora_alpha / r) B A x with A [r, in] and B [out, r] (peft.LoraConfig). Our scale * a core b becomes
A = (a core)^T, B = b^T, lora_alpha = scale * r, with r and lora_alpha by module where modules differ. A method that
starts from a residual changes the kernel too; the sum of that change and the correction, of rank 2 R at most, is
factored anew. Checked against peft 0.21 in tests/parity.

Axis letters: I input features, O output features, R rank.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from finetune.adapters.adapter import Adapter, Factors, Values, rebase
from models.config import DecoderConfig
from models.errors import InputError
from models.families import FAMILIES
from models.families.common import keep, transpose
from models.weights.assemble import row_of
from models.weights.whole import whole_folder

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


class Lora(NamedTuple):
    """One module as PEFT has it: scale * b a, a f32[R, I], b f32[O, R]."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def fold(adapter: Adapter, params: Any, frozen: Values, trainable: Values) -> dict[str, Lora]:
    """Returns each module's difference from the model's own kernel as a LoRA; modules of rank 0 are left out.

    Args:
        adapter: the method.
        params: the model's own parameters.
        frozen: the adapter's frozen values.
        trainable: its trained values.
    """
    own = flatten_dict(params, sep="/")
    bases = flatten_dict(rebase(adapter, params, frozen), sep="/")
    folded = {}
    for path in trainable:
        kernel, base = own[f"{path}/kernel"], bases[f"{path}/kernel"]
        factors = adapter.factors(frozen.get(path, {}), trainable[path], kernel.shape)
        if factors.a.shape[1]:
            folded[path] = _lora(factors) if base is kernel else _refactored(factors, kernel, base)
    return folded


def export_peft(
    folder: Path | str,
    config: DecoderConfig,
    base_name: str,
    adapter: Adapter,
    params: Any,
    frozen: Values,
    trainable: Values,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` reads; it appears complete or not at all.

    Args:
        folder: where to; an adapter for PEFT that stands there is replaced.
        config: the model's.
        base_name: what PEFT is to call the model: a hub name or a path.
        adapter: the method.
        params: the model's own parameters.
        frozen: the adapter's frozen values.
        trainable: its trained values, after `Adapter.finish`.

    Raises:
        InputError: a layer that transformers keeps as a part of a larger one, nothing to export, or a folder that
            cannot be written.
    """
    modules = {_module_name(path, config): lora for path, lora in fold(adapter, params, frozen, trainable).items()}
    if not modules:
        raise InputError("every rank of this adapter is 0, so there is nothing to export: use the model as it is")
    tensors = {}
    for name, lora in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(lora.a)  # written as it lies in memory
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(lora.b)
    with whole_folder(folder, mark=CONFIG_NAME) as staging:
        save_file(tensors, staging / WEIGHTS_NAME, {"format": "pt"})
        text = json.dumps(_peft_config(modules, config, base_name), indent=1)
        (staging / CONFIG_NAME).write_text(text, encoding="utf-8")


def _lora(factors: Factors) -> Lora:
    a, core, b = (None if x is None else np.asarray(jax.device_get(x), np.float32) for x in factors[:3])
    if core is not None:
        a = a * core[None, :] if core.ndim == 1 else a @ core
    return Lora(a.T, b.T, float(factors.scale))


def _refactored(factors: Factors, kernel: jax.Array, base: jax.Array) -> Lora:
    """Returns base + correction - kernel as a LoRA of scale 1; its rank is 2 R at most."""
    lora = _lora(factors)
    moved = np.asarray(jax.device_get(base), np.float32) - np.asarray(jax.device_get(kernel), np.float32)
    u, s, v = np.linalg.svd(moved + lora.scale * (lora.b @ lora.a).T, full_matrices=False)
    rank = min(2 * lora.a.shape[0], len(s))
    return Lora(s[:rank, None] * u[:, :rank].T, v[:rank].T, 1.0)


def _module_name(path: str, config: DecoderConfig) -> str:
    """Returns a layer's name in transformers' model."""
    family = FAMILIES[config.family]
    row = row_of(f"{path}/kernel", family.hf)
    if row is None or row.convert not in (keep, transpose):
        raise InputError(
            f"{path} is not a layer of its own in transformers' {config.family} models, so PEFT cannot adapt it alone: "
            "leave it out of the targets, or save the merged model"
        )
    return family.prefix + row.source.removesuffix(".weight")


def _peft_config(modules: dict[str, Lora], config: DecoderConfig, base_name: str) -> dict[str, Any]:
    ranks = {name: lora.a.shape[0] for name, lora in modules.items()}
    alphas = {name: lora.scale * ranks[name] for name, lora in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    first = row_of("layers_0/mlp/up/kernel", FAMILIES[config.family].hf)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": list(modules),
        "fan_in_fan_out": first.convert is keep,  # kernels stored [in, out]
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
