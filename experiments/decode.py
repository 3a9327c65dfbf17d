"""Decodes prompts with a model by name or path: `python -m experiments.decode --prompt "Why is the sky blue?"`.

Prints the texts and a table of speeds, or one JSON object per prompt (`--output json`) with the keys prompt, text,
token_ids, stats, seconds {load, compile, prefill, decode}, device and, for methods that search, found: all texts that
they return, best first, with their scores. Prompts of a batch share their seconds; `compile` is 0 where nothing new was
compiled.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.config import load_config
from experiments.decode_config import CONTEXT, DecodeConfig, check_method, read_prompts, with_contexts
from experiments.loading import Loader
from experiments.runtime import run_main, setup_runtime
from experiments.timed import TimedDecode
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class Record:
    """One decoded prompt: a line of the JSON output."""

    prompt: str
    text: str
    token_ids: list[int]
    stats: dict[str, Any]  # see decoding.state.DecodeStats, and prompt_tokens
    seconds: dict[str, float]  # load, compile, prefill, decode
    device: str
    found: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # text and score of each text of a search


class Runner:
    """A loaded model with one decode function; decodes batches and keeps what is compiled."""

    def __init__(self, config: DecodeConfig):
        """Loads the model; raises InputError for whatever the config has wrong about it."""
        import jax

        check_method(config)
        begin = time.perf_counter()
        loader = Loader(config.dtype)
        if config.adapter is not None:
            loader.adapt(config.model, config.adapter)
        self.reader = None
        if config.dolphin is not None:
            self.reader = loader.pair(config.model, config.compressor, config.dolphin)
        self.decode_fn, params, self.tokenizer = loader.decode_fn(
            config.model,
            config.method,
            config.options,
            draft=config.draft,
            head=config.head,
            max_new_tokens=config.max_new_tokens,
        )
        self.params = jax.block_until_ready(params)
        self.load_seconds = time.perf_counter() - begin
        self.config = config
        self.grammar = self._grammar()
        self.timed = TimedDecode(self.decode_fn, self.params)
        self.device = str(jax.devices()[0].device_kind)

    def _grammar(self) -> Any:
        """Returns the config's grammar for this model, or None; raises InputError for what is wrong about it."""
        from decoding import grammar

        for name, source in dataclasses.asdict(self.config.grammar).items():
            if source is not None:
                vocabulary = grammar.Vocabulary.of(self.tokenizer, self.decode_fn.plan.model.config.vocab_size)
                return getattr(grammar, name)(source, vocabulary)
        return None

    def encode(self, prompt: str) -> list[int]:
        """Returns the ids of a prompt, through the chat template where there is one and the config wants it."""
        if self.reader is not None:
            return self._encode_around(prompt)
        if self.config.chat and self.tokenizer.chat_template is not None:
            return self.tokenizer.encode_chat(prompt)
        return self.tokenizer.encode(prompt)

    def _encode_around(self, prompt: str) -> list[int]:
        """Returns the ids of a prompt with a place for its context: inside the user's turn, where there is one."""
        from decoding.contexts import encode_with_slot

        text = prompt if CONTEXT in prompt else CONTEXT + prompt
        is_chat = self.config.chat and self.tokenizer.chat_template is not None
        text = self.tokenizer.chat(text) if is_chat else text
        return encode_with_slot(self.tokenizer, text, CONTEXT, add_special=not is_chat)

    def decode(
        self, prompts: Sequence[str], seeds: Sequence[int], contexts: Sequence[str] | None = None
    ) -> list[Record]:
        """Decodes one batch; with `stream` its text is printed as it is made. Contexts None: those of the config."""
        if contexts is None:
            contexts = with_contexts(self.config, prompts)
        settings = {k: v for k, v in dataclasses.asdict(self.config.sampling).items() if v is not None}
        ids = [self.encode(prompt) for prompt in prompts]
        inputs = self.decode_fn.inputs(ids, seeds, grammars=self.grammar, contexts=self._contexts(contexts), **settings)
        state, taken = self.timed(inputs, self._stream if self.config.stream else None)
        seconds = {"load": self.load_seconds, **taken._asdict()}
        found = self.decode_fn.output(state).found
        records = [self._record(row, prompt, ids[row], state, seconds) for row, prompt in enumerate(prompts)]
        return [dataclasses.replace(r, found=self._found(found, row)) for row, r in enumerate(records)]

    def _contexts(self, contexts: Sequence[str]) -> list[list[int]] | None:
        return None if self.reader is None else [self.reader.encode(context) for context in contexts]

    def _found(self, found: Any, row: int) -> list[dict[str, Any]]:
        """Returns text and score of each text that a search has found for a row; none where it was no search."""
        if found is None:
            return []
        rows = zip(found.tokens[row].tolist(), found.lengths[row].tolist(), found.scores[row].tolist(), strict=True)
        return [{"text": self.tokenizer.decode(text[:n]), "score": score} for text, n, score in rows if n]

    def _stream(self, advance: Callable, params: Any, state: Any) -> Any:
        from decoding.stream import stream_state

        return _print_pieces(stream_state(advance, params, state, self.tokenizer))

    def _record(self, row: int, prompt: str, ids: list[int], state: Any, seconds: dict[str, float]) -> Record:
        tokens = state.tokens[row, : int(state.lengths[row])].tolist()
        counts = {
            field.name: getattr(state.stats, field.name)[row].tolist() for field in dataclasses.fields(state.stats)
        }
        stats = {"prompt_tokens": len(ids), **counts}
        return Record(prompt, self.tokenizer.decode(tokens), tokens, stats, seconds, self.device)


def _print_pieces(pieces: Iterator[str]) -> Any:
    """Prints pieces of text as they come and returns the generator's value."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as stop:
            print()
            return stop.value


def speed_table(records: Sequence[Record]) -> str:
    """Returns a table with a line per prompt and a total: tokens, seconds, and new tokens per second of decoding."""
    lines = [f"{'prompt':<40} {'tokens':>6} {'new':>5} {'prefill s':>9} {'decode s':>8} {'tokens/s':>8}"]

    def line(name: str, prompt_tokens: int, new: int, prefill: float, decode: float) -> str:
        name = name if len(name) <= 40 else name[:37] + "..."
        return f"{name:<40} {prompt_tokens:>6} {new:>5} {prefill:>9.2f} {decode:>8.2f} {new / decode:>8.1f}"

    for r in records:
        name = " ".join(r.prompt.split())
        lines.append(
            line(name, r.stats["prompt_tokens"], r.stats["emitted"], r.seconds["prefill"], r.seconds["decode"])
        )
    batches = {id(r.seconds): r.seconds for r in records}.values()
    prefill, decode = sum(s["prefill"] for s in batches), sum(s["decode"] for s in batches)
    sums = [sum(r.stats[key] for r in records) for key in ("prompt_tokens", "emitted")]
    return "\n".join([*lines, line("all", *sums, prefill, decode)])


def main() -> None:
    """Loads the config and the model, decodes every prompt, prints and saves."""
    config = load_config(DecodeConfig, prog="python -m experiments.decode", description=(__doc__ or "").split("\n")[0])
    prompts = read_prompts(config)
    contexts = with_contexts(config, prompts)
    setup_runtime()
    runner = Runner(config)
    records = []
    with json_lines(config.save) as write:
        for start in range(0, len(prompts), config.batch_size):
            batch = prompts[start : start + config.batch_size]
            if config.stream:
                print(f"\n>>> {batch[0]}")
            beside = contexts[start : start + config.batch_size]
            for record in runner.decode(batch, [config.seed + start + i for i in range(len(batch))], beside):
                records.append(record)
                write(record)
                _print_record(config, record)
    if config.output == "text":
        _print_summary(config, runner, records)


def _print_record(config: DecodeConfig, record: Record) -> None:
    """Prints a record as the config wants it; of a streamed text only what is not on the screen yet."""
    if config.output == "json":
        print(_json(record), flush=True)
        return
    if not config.stream:
        print(f"\n>>> {record.prompt}\n{record.text}", flush=True)
    for other in record.found[1:]:
        print(f"[{other['score']:.4f}] {other['text']}", flush=True)


def _print_summary(config: DecodeConfig, runner: Runner, records: Sequence[Record]) -> None:
    compile_seconds = sum({id(r.seconds): r.seconds["compile"] for r in records}.values())
    print(f"\n{config.model} on {runner.device}, method {config.method}")
    print(f"loaded in {runner.load_seconds:.1f} s, compiled in {compile_seconds:.1f} s\n")
    print(speed_table(records))
    if config.save is not None:
        print(f"\nresults saved in {config.save}")


@contextlib.contextmanager
def json_lines(path: Path | None) -> Iterator[Callable[[Record], None]]:
    """Gives a function that writes a record to a JSON Lines file; nothing is written where there is no path.

    The file gets its name when it is complete. Lines written before an interruption stay in `PATH.partial`.
    """
    if path is None:
        yield lambda record: None
        return
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error
    try:
        with file:
            yield lambda record: print(_json(record), file=file, flush=True)
        partial.replace(path)
    finally:
        if partial.exists() and partial.stat().st_size == 0:
            partial.unlink()


def _json(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record), ensure_ascii=False)


if __name__ == "__main__":
    run_main(main)
