"""What the mains decode with: models, drafts and heads by name, and a decode function over them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import InputError

MEASURED = "measured"  # as an option `latency`: the curve of this machine


class Loader:
    """Loads each model once."""

    def __init__(self, dtype: str | None):
        """Takes the dtype of all models; None: as stored."""
        self.dtype = dtype
        self._models: dict[str, Any] = {}
        self._gates: dict[Any, Any] = {}
        self._bases: dict[str, Any] = {}

    def model(self, name: str) -> tuple[Any, Any, Any]:
        """Returns (model, params, tokenizer) of a registry name or path."""
        from models import load_model

        if name not in self._models:
            self._models[name] = load_model(name, self.dtype)
        return self._models[name]

    def adapt(self, name: str, adapter: Path) -> None:
        """Merges a saved adapter into a model; raises InputError where it belongs to another one."""
        from finetune.adapters.saved import with_adapter

        model, params, tokenizer = self.model(name)
        self._models[name] = model, with_adapter(adapter, name, params), tokenizer

    def pair(self, name: str, compressor: str, file: Path) -> Any:
        """Puts a trained pair's compressor before a model; returns the compressor's tokenizer.

        Raises:
            InputError: the pair was made of other models, or the compressor has no tokenizer.
        """
        from finetune.adapters.saved import base_of
        from finetune.saved_dolphin import Bases, load_dolphin

        main, main_params, tokenizer = self.model(name)
        small, small_params, reader = self.with_tokenizer(compressor)
        bases = Bases(base_of(compressor, small_params), base_of(name, main_params))
        self._models[name] = *load_dolphin(file, bases, (small, small_params), (main, main_params)), tokenizer
        return reader

    def with_tokenizer(self, name: str) -> tuple[Any, Any, Any]:
        """Returns what `model` does; raises InputError where the model has no tokenizer."""
        model, params, tokenizer = self.model(name)
        if tokenizer is None:
            raise InputError(f"{name} has no tokenizer.json: put the model's tokenizer.json into the folder")
        return model, params, tokenizer

    def rounded(self, name: str) -> str:
        """Returns the name of a copy of a model whose weights are rounded to 8 bits: a draft that is often right."""
        import jax
        import jax.numpy as jnp

        copy = f"{name}, rounded"
        if copy not in self._models:
            model, params, tokenizer = self.model(name)
            params = jax.tree.map(lambda x: x.astype(jnp.float8_e4m3fn).astype(x.dtype), params)
            self._models[copy] = model, params, tokenizer
        return copy

    def decode_fn(
        self,
        name: str,
        method: str,
        options: Mapping[str, Any],
        *,
        draft: str | None,
        head: Path | None,
        max_new_tokens: int,
        context: int = 256,
    ) -> tuple[Any, Any, Any]:
        """Returns (decode function, the params to call it with, tokenizer).

        Args:
            name: the model.
            method: a decoding method.
            options: its own static options; `latency: measured` stands for the curve of this machine, `gates: measured`
                or a seed for those of `experiments.gates`, a file as `direction` for the layer and direction in it.
            draft: the model that drafts, or None.
            head: the draft's acceptance head, or None; or the model's own draft head, which brings its settings and
                accuracy into the options.
            max_new_tokens: room for new tokens.
            context: tokens behind which a measured curve is measured.

        Raises:
            InputError: a model without a tokenizer, a head of another model, or options that do not fit.
        """
        from decoding import METHODS, WithDraft, make_decode_fn
        from decoding.contexts import writer
        from models.encoder_decoder import decoder_only

        model, params, tokenizer = self.model(name)
        if method in METHODS and not METHODS[method].encoders:  # before anything is measured
            decoder_only(writer(model), f"method {method!r}")
        if tokenizer is None:
            raise InputError(f"{name} has no tokenizer.json: put the model's tokenizer.json into the folder")
        options = dict(options)
        if options.get("latency") == MEASURED:
            options["latency"] = _curve(model, params, context)
        if method == "lserve":
            options = self.with_gates(name, options)
        if method == "knob" and isinstance(options.get("direction"), str | Path):
            options |= self._direction(name, Path(options["direction"]), params)
        if draft is not None:
            options["draft"], drafts, _ = self.model(draft)
            params = WithDraft(
                params, drafts if head is None else _with_head(name, draft, options["draft"], drafts, head)
            )
        elif METHODS[method].own_head:
            head_options, values = self._own_head(name, method, params, head)
            options, params = {**options, **head_options}, WithDraft(params, values)
        if METHODS[method].own_head and options.get("latency") is not None:
            options["latency"] = _with_drafting(model, method, options, params, context)
        stops = tokenizer.stop_ids
        decode_fn = make_decode_fn(model, method, max_new_tokens=max_new_tokens, stop_tokens=stops, **options)
        return decode_fn, params, tokenizer

    def _own_head(self, name: str, method: str, params: Any, head: Path | None) -> tuple[dict[str, Any], Any]:
        """Returns what a draft head's file brings into the options, and the head's values."""
        from finetune.saved_heads import load_draft_head

        if head is None:
            raise InputError(
                f"method {method!r} drafts with a trained head: name its file with --head; python -m "
                f"experiments.train_draft_head --config configs/train/{method}.yaml trains one"
            )
        saved = load_draft_head(head, self._base(name, params), method)
        return {"head": saved.config, "accuracy": saved.accuracy}, saved.values

    def _base(self, name: str, params: Any) -> Any:
        """Returns what identifies a model."""
        from finetune.adapters.saved import base_of

        if name not in self._bases:
            self._bases[name] = base_of(name, params)
        return self._bases[name]

    def _direction(self, name: str, path: Path, params: Any) -> dict[str, Any]:
        """Returns what the file of a trained direction brings into the options of `knob`."""
        from finetune.knob import load_direction

        saved = load_direction(path, self._base(name, params))
        return {"layer": saved.layer, "direction": tuple(saved.direction.tolist())}

    def with_gates(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns options of `lserve` with gates in numbers; those of a model, sink and window are measured once."""
        source = options.get("gates")
        if not isinstance(source, str | int):
            return dict(options)
        from decoding.sparse.lserve import LServeOptions
        from experiments.gates import gates_from

        window = {key: options.get(key, getattr(LServeOptions, key)) for key in ("sink", "local")}
        key = name, source, *window.values()
        if key not in self._gates:
            self._gates[key] = gates_from(source, *self.model(name), **window)
        return {**options, "gates": self._gates[key]}


def _curve(model: Any, params: Any, context: int) -> Any:
    from decoding.speculative.sizing import latency_curve
    from models.weights.fetch import cache_folder

    return latency_curve(model, params, cache_folder() / "latency", context=context)


def _with_drafting(model: Any, method: str, options: dict[str, Any], params: Any, context: int) -> Any:
    """Returns the curve among a draft head's options with what its guesses cost here."""
    from decoding import make_decode_fn
    from decoding.speculative.sizing import with_drafting

    repeats = 9
    room = (repeats + 2) * (options["head"].offsets + 1)
    whole = make_decode_fn(model, method, max_new_tokens=room, **{**options, "latency": None})
    return with_drafting(options["latency"], whole, params, context=context, repeats=repeats)


def _with_head(target: str, name: str, draft: Any, params: Any, head: Path) -> Any:
    from decoding import WithHead
    from models.acceptance_head import load_head

    return WithHead(params, *load_head(head, name, draft.config.width, target))
