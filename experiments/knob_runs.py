"""The models of the context knob's table: what they are asked, tuned on and read with; and the figures kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.config import dump_config
from experiments.kept import cell_key, keep, read_kept
from experiments.knob_config import KnobTableConfig
from finetune.context_tasks import Item, conversation, items, prompt, split
from finetune.sources import Columns, FileData
from models.errors import InputError
from models.weights.whole import whole_file

Figures = dict[str, Any]
INTENTS = ("use", "ignore")
BATCH = 32


class KnobRuns:
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
            made = self.known(made)
        train, test = split(made, 0.3, self.config.seed)
        if not train or not test:
            raise InputError(f"{self.config.model} answers too few of the questions: set known_only to false")
        return {"items": [train[: self.size.train], test[: self.size.test]]}

    def known(self, made: list[Item]) -> list[Item]:
        """Returns the items whose right answer the untuned model prefers to others of its family, without a context.

        Deviation: the paper keeps what the model answers in one word by itself, which a small model hardly ever does.
        """
        asked = list({item.query: item for item in made}.values())
        answers: dict[str, set[int]] = {}
        for item in asked:
            answers.setdefault(item.family, set()).add(self.token(item.known))
        rows = [(prompt(item, None, with_context=False), item.known) for item in asked]
        right = self.first_tokens("untuned", rows, [sorted(answers[item.family]) for item in asked])
        known = {item.query for item, is_right in zip(asked, right, strict=True) if is_right}
        return [item for item in made if item.query in known]

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

    def first_tokens(
        self,
        name: str,
        rows: list[tuple[list[dict[str, str]], str]],
        options: list[list[int]] | None = None,
    ) -> list[bool]:
        """Returns whether the likeliest first token of an answer, of a row's options or of all, is the right one's."""
        import numpy as np

        right: list[bool] = []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            last, answers = self.reads(name, part + part[:1] * (BATCH - len(part)))
            logits = np.asarray(last.logits)[: len(part)]
            if options is not None:
                among = np.full(logits.shape, -np.inf, np.float32)
                for row, ids in enumerate(options[start : start + BATCH]):
                    among[row, ids] = logits[row, ids]
                logits = among
            right += (logits.argmax(axis=-1) == answers[: len(part)]).tolist()
        return right

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
