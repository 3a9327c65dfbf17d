"""The table of context against knowledge (2411.07404): intents before and after tuning, the layers, the direction.

A model is tuned by LoRA to use or to ignore a context as it is told; patched runs say in which layers the intent is; a
direction is learned behind each candidate layer and held against a random one, the difference of the means, and the
whole stream; and the best one steers, without any instruction, the tuned model and the untuned one. Only questions
that the untuned model answers without a context are asked. Everything that is finished is kept.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from experiments.config import dump_config
from experiments.kept import cell_key, keep, read_kept
from experiments.knob_config import KnobTableConfig
from finetune.context_tasks import Item, conversation, items, prompt, split
from finetune.sources import Columns, FileData
from models.errors import InputError
from models.weights.whole import whole_file

Figures = dict[str, Any]
INTENTS = ("use", "ignore")
_BATCH = 32


class Measured(NamedTuple):
    """What the table shows: figures by row, the layers of each direction of patching, the direction that was saved."""

    rows: dict[str, Figures]
    searches: dict[str, Figures]
    chosen: Figures


def measure(config: KnobTableConfig) -> Measured:
    """Measures what is missing."""
    bench = _Bench(config)
    train, test = bench.kept("items", bench.choose)["items"]
    train, test = ([Item(*item) for item in side] for side in (train, test))
    bench.tune(train)
    rows = {name: bench.kept(name, lambda name=name: bench.intents(name, test)) for name in ("untuned", "tuned")}
    searches = bench.kept("layers", lambda: bench.search(train))
    depth, candidates = bench.depth, {int(share * bench.depth) for share in config.size.layers}
    candidates |= {min(found["stop"], depth) - 1 for found in searches.values()}
    found = {}
    for layer in sorted(candidates):
        found[layer] = bench.kept(f"direction-{layer}", lambda layer=layer: bench.direction(layer, train, test))
        shown = {name: value for name, value in found[layer].items() if name != "unit"}
        rows |= {f"direction, layer {layer}": shown}
    best = max(found, key=lambda layer: found[layer]["turned_train"])
    chosen = bench.kept("steering", lambda: bench.steer(best, found[best]["unit"], train, test))
    rows |= chosen.pop("rows")
    bench.save(best, found[best])
    return Measured(rows, searches, chosen)


class _Bench:
    """The models of a table, loaded when they are first needed, and its kept figures."""

    def __init__(self, config: KnobTableConfig):
        """Loads nothing yet."""
        self.config, self.size, self._models = config, config.size, {}
        shared = (config.model, config.families, config.contexts, config.known_only, config.seed, config.size)
        self.key = cell_key(*shared, dump_config(config.run))

    def kept(self, name: str, make: Any) -> Figures:
        """Returns figures that are kept, or makes and keeps them."""
        path = self.config.folder / "runs" / f"{name}.json"
        kept = read_kept(path, self.key)
        if kept is None:
            kept = {"figures": make()}
            keep(path, self.key, **kept)
            print(f"{name}", flush=True)
        return dict(kept["figures"])

    def model(self, name: str) -> tuple[Any, Any, Any]:
        """Returns (model, params, tokenizer) of the untuned or the tuned model."""
        from finetune.adapters.saved import with_adapter
        from models import load_model

        if name not in self._models:
            self._models[name] = model, params, tokenizer = load_model(self.config.model)
            if name == "tuned":
                self._models[name] = model, with_adapter(self.run_dir / "adapter", self.config.model, params), tokenizer
        return self._models[name]

    @property
    def depth(self) -> int:
        """L."""
        return self.model("untuned")[0].config.num_layers

    @property
    def run_dir(self) -> Path:
        """Where the tuned model's run is: other settings have another, so that no figures are of an older model."""
        return self.config.folder / f"lora-{self.key[:12]}"

    def choose(self) -> Figures:
        """Returns items to train and to test on: those known, whose two answers begin with different tokens."""
        made = items(self.config.families, self.config.contexts, self.config.seed)
        made = [item for item in made if self.token(item.known) != self.token(item.said)]
        if self.config.known_only:
            asked = list({item.query: item for item in made}.values())
            wanted = [(prompt(item, None, with_context=False), item.known) for item in asked]
            right = self.first_tokens("untuned", wanted)
            known = {item.query for item, is_right in zip(asked, right, strict=True) if is_right}
            made = [item for item in made if item.query in known]
        train, test = split(made, 0.3, self.config.seed)
        if not train or not test:
            raise InputError(f"{self.config.model} answers too few of the questions: set known_only to false")
        return {"items": [train[: self.size.train], test[: self.size.test]]}

    def ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Returns a conversation's tokens, up to the answer."""
        tokenizer = self.model("untuned")[2]
        if tokenizer.chat_template is None:
            return tokenizer.encode("\n".join(message["content"] for message in messages) + "\nAnswer: ")
        return tokenizer.encode_chat(messages)

    def token(self, answer: str) -> int:
        """Returns an answer's first token."""
        return self.model("untuned")[2].encode(answer, add_special=False)[0]

    def tune(self, train: list[Item]) -> None:
        """Trains the adapter, or goes on to train it."""
        from experiments.training import run_training

        path, chat = self.config.folder / "train.jsonl", self.model("untuned")[2].chat_template is not None
        records: list[Any] = [conversation(item, intent) for item in train for intent in INTENTS]
        lines = [{"messages": turns} for turns in records]
        if not chat:
            lines = [
                {
                    "prompt": "\n".join(turn["content"] for turn in turns[:-1]) + "\nAnswer: ",
                    "completion": turns[-1]["content"],
                }
                for turns in records
            ]
        columns = Columns(messages="messages") if chat else Columns(prompt="prompt", completion="completion")
        with whole_file(path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        data = FileData(path=path, test_share=0.0, columns=columns)
        run = dataclasses.replace(self.config.run, model=self.config.model, data=data, steps=self.size.steps)
        if not (self.run_dir / "adapter" / "adapter.json").is_file():
            run_training(dataclasses.replace(run, run_dir=self.run_dir))

    def reads(self, name: str, rows: list[tuple[list[dict[str, str]], str]]) -> Any:
        """Returns (`LastTokens`, i32[N] first tokens of the answers) of conversations with their right answers."""
        import numpy as np

        from finetune.knob import read_last

        model, params, _ = self.model(name)
        answers = np.array([self.token(answer) for _, answer in rows], np.int32)
        return read_last(model, params, [self.ids(messages) for messages, _ in rows]), answers

    def first_tokens(self, name: str, rows: list[tuple[list[dict[str, str]], str]]) -> list[bool]:
        """Returns whether the likeliest first token of each answer is the right one's."""
        import numpy as np

        right: list[bool] = []
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            last, answers = self.reads(name, part + part[:1] * (_BATCH - len(part)))
            right += (np.asarray(last.logits).argmax(axis=-1) == answers)[: len(part)].tolist()
        return right

    def intents(self, name: str, test: list[Item]) -> Figures:
        """Returns how often a model follows each intent when it is told to."""
        rows = [(prompt(item, intent), item.answer(intent)) for item in test for intent in INTENTS]
        right = self.first_tokens(name, rows)
        return _shares(right[::2], right[1::2])

    def pairs(self, made: list[Item], most: int) -> Any:
        """Returns `reads` of the tuned model on pairs whose both intents it follows."""
        import jax
        import numpy as np

        rows = [(prompt(item, intent), item.answer(intent)) for item in made[:most] for intent in INTENTS]
        last, answers = self.reads("tuned", rows)
        right = (np.asarray(last.logits).argmax(axis=-1) == answers).reshape(-1, 2).all(axis=1)
        rows = np.flatnonzero(np.repeat(right, 2) if right.any() else np.ones(len(answers), bool))
        picked = jax.tree.map(lambda x: x[rows], last.replace(hidden=None))
        return picked.replace(hidden=last.hidden[:, rows]), answers[rows], bool(right.any())

    def search(self, train: list[Item]) -> Figures:
        """Returns the layers that carry the intent, in both directions of patching."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from finetune.knob import patched_chances, search_layers

        model, params, _ = self.model("tuned")
        last, answers, _ = self.pairs(train, self.size.search)
        found = {}
        for name, target, source in (("to context", 1, 0), ("to knowledge", 0, 1)):
            ours = jax.tree.map(lambda x, t=target: x[t::2], last.replace(hidden=None))
            theirs = tuple(out[source::2] for out in last.outputs)
            wanted = jnp.asarray(answers[source::2])

            def run(chosen: Any, ours=ours, theirs=theirs, wanted=wanted) -> Any:
                chances = patched_chances(model, params, ours, theirs, jnp.asarray(chosen), wanted)
                return np.asarray(chances.mean(axis=1))

            law = np.asarray(jax.nn.softmax(ours.logits, axis=-1))
            base = float(law[np.arange(len(law)), answers[target::2]].mean())
            found[name] = search_layers(run, min(base, 0.5), self.depth)._asdict()
        return found

    def direction(self, layer: int, train: list[Item], test: list[Item]) -> Figures:
        """Returns a learned direction, and how many answers it and others turn on held-out pairs."""
        import jax.numpy as jnp
        import numpy as np

        from finetune.knob import continued, exchanged, train_direction

        model, params, _ = self.model("tuned")
        last, answers, _ = self.pairs(train, self.size.train)
        steps = self.size.direction_steps
        unit, losses = train_direction(model, params, layer, last, answers, steps=steps, seed=self.config.seed)
        means = [np.asarray(last.hidden[layer, side::2], np.float32).mean(axis=0) for side in (0, 1)]
        random = np.random.default_rng(self.config.seed).standard_normal(len(unit)).astype(np.float32)
        held, wanted, confident = self.pairs(test, self.size.test)

        def turned(reads: Any, right: Any, unit: Any) -> float:
            hidden, partner = reads.hidden[layer], np.arange(len(right)) ^ 1
            unit = None if unit is None else jnp.asarray(unit / max(float(np.linalg.norm(unit)), 1e-9))
            h = hidden[partner] if unit is None else exchanged(hidden, hidden[partner], unit)
            logits = np.asarray(continued(model, layer, params, h, reads.cache))
            return float((logits.argmax(axis=-1) == right[partner]).mean())

        along = np.asarray(held.hidden[layer], np.float32) @ unit
        return {
            "unit": unit.tolist(),
            "loss": losses[-1],
            "turned_train": turned(last, answers, unit),
            "turned": turned(held, wanted, unit),
            "turned_random": turned(held, wanted, random),
            "turned_means": turned(held, wanted, means[0] - means[1]),
            "turned_whole": turned(held, wanted, None),
            "auc": _auc(along[::2], along[1::2]),
            "confident": float(confident),
        }

    def steer(self, layer: int, unit: list[float], train: list[Item], test: list[Item]) -> Figures:
        """Returns how the direction steers prompts without an instruction, strengths chosen on those trained on."""
        import jax.numpy as jnp
        import numpy as np

        from decoding.knob import coordinate, steered
        from finetune.knob import continued

        u = jnp.asarray(unit, jnp.float32)
        model, params, _ = self.model("tuned")
        open_rows = [(prompt(item, None), item.said) for item in train[: self.size.test]]
        known = np.array([self.token(item.known) for item in train[: self.size.test]])
        last, said = self.reads("tuned", open_rows)
        told = self.pairs(train, self.size.test)[0].hidden[layer]  # half of them to use the context, half to ignore it
        along = np.asarray(coordinate(told, u))
        away = np.array([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0], np.float32)
        grid = along.mean() + along.std() * np.concatenate([-away, away])

        def shares(c: float) -> tuple[float, float]:
            h = steered(last.hidden[layer], u, jnp.full(len(said), c, jnp.float32))
            best = np.asarray(continued(model, layer, params, h, last.cache)).argmax(axis=-1)
            return float((best == said).mean()), float((best == known).mean())

        scores = {float(c): shares(float(c)) for c in grid}
        use = max(scores, key=lambda c: scores[c][0] - scores[c][1])
        ignore = max(scores, key=lambda c: scores[c][1] - scores[c][0])
        rows = {f"steered, {name}": self.steered(name, layer, unit, use, ignore, test) for name in ("untuned", "tuned")}
        return {"layer": layer, "use": use, "ignore": ignore, "deviation": float(along.std()), "rows": rows}

    def steered(self, name: str, layer: int, unit: list[float], use: float, ignore: float, test: list[Item]) -> Figures:
        """Returns how often a model follows the knob, by the decoding method, and how often its memory without it."""
        from decoding import make_decode_fn

        model, params, tokenizer = self.model(name)
        fn = make_decode_fn(
            model, "knob", max_new_tokens=8, stop_tokens=tokenizer.stop_ids, layer=layer, direction=tuple(unit)
        )
        prompts = [self.ids(prompt(item, None)) for item in test]

        def words(strength: float) -> list[str]:
            found: list[str] = []
            for start in range(0, len(prompts), _BATCH):
                part = prompts[start : start + _BATCH]
                out = fn(params, part + part[:1] * (_BATCH - len(part)), strength=strength)
                texts = zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)
                found += [tokenizer.decode(text[:length]).strip() for text, length in texts][: len(part)]
            return found

        answers = {"use": words(use), "ignore": words(ignore), "none": words(float("nan"))}
        used, ignored = (
            [text.startswith(item.answer(intent)) for text, item in zip(answers[intent], test, strict=True)]
            for intent in INTENTS
        )
        memory = {f"memory_{which}": _memory_share(texts, test) for which, texts in answers.items()}
        moved = memory["memory_ignore"] - memory["memory_use"]
        return _shares(used, ignored) | memory | {"memory_moved": moved}

    def save(self, layer: int, figures: Figures) -> None:
        """Writes the chosen direction, with the hash of the model."""
        import numpy as np

        from finetune.adapters.saved import base_of
        from finetune.knob import SavedDirection, save_direction

        numbers = {name: float(value) for name, value in figures.items() if name != "unit"}
        bases = [base_of(self.config.model, self.model(name)[1]) for name in ("untuned", "tuned")]
        saved = SavedDirection(layer, np.asarray(figures["unit"], np.float32), numbers, *bases)
        save_direction(self.config.folder / "direction.safetensors", saved)


def _shares(used: list[bool], ignored: list[bool]) -> Figures:
    """Returns the shares of right answers of both intents, and of items right under both."""
    count = max(len(used), 1)
    both = sum(a and b for a, b in zip(used, ignored, strict=True))
    return {"use": sum(used) / count, "ignore": sum(ignored) / count, "pairs": both / count, "items": len(used)}


def _memory_share(texts: list[str], made: list[Item]) -> float:
    """Returns known answers / (known answers + those that the context says); 0.5 where there are neither."""
    known = sum(text.startswith(item.known) for text, item in zip(texts, made, strict=True))
    said = sum(text.startswith(item.said) for text, item in zip(texts, made, strict=True))
    return known / (known + said) if known + said else 0.5


def _auc(first: Any, second: Any) -> float:
    """Returns the chance that one of `first` lies above one of `second`, or below, whichever is larger."""
    above = (first[:, None] > second[None, :]).mean() + 0.5 * (first[:, None] == second[None, :]).mean()
    return float(max(above, 1 - above))
