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
from typing import Any, Literal

from experiments.config import load_config
from experiments.loading import Loader
from experiments.runtime import run_main, setup_runtime
from experiments.timed import TimedDecode
from models.errors import InputError, unknown_name

CONTEXT = "<context>"  # stands in a prompt where its context is to stand; in front where it does not


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """Settings of methods that sample; None keeps the method's default."""

    temperature: float | None = None  # >= 0; 0 is greedy
    top_k: int | None = None  # keep the k most likely tokens; 0 keeps all
    top_p: float | None = None  # (0, 1]; keep the smallest set with this mass
    min_p: float | None = None  # [0, 1]; keep tokens with this share of the top probability
    repetition_penalty: float | None = None  # > 0; 1 changes nothing


@dataclasses.dataclass(frozen=True)
class GrammarSettings:
    """A grammar for all texts, in one of three languages; for methods that take one."""

    regex: str | None = None  # a regular expression that the whole text matches
    lark: str | None = None  # a context-free grammar in Lark's syntax, whose first rule is `start`
    json_schema: str | None = None  # a JSON Schema, as JSON

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.regex, self.lark, self.json_schema)) > 1:
            raise ValueError("give one grammar at most: regex, lark or json_schema")


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """One decoding run."""

    model: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    dtype: Literal["float32", "bfloat16"] | None = None  # None: as stored (GGUF: float32)
    prompt: tuple[str, ...] = ()  # one or several prompts
    prompts: Path | None = None  # a JSON Lines file whose objects have a "prompt"; they come behind those of the flag
    chat: bool = True  # put prompts through the model's chat template, where it has one
    adapter: Path | None = None  # an adapter that experiments.train saved for this model; merged into it
    dolphin: Path | None = None  # a trained pair (experiments.train with `dolphin`): `model` reads memory of contexts
    compressor: str = "smollm2-135m-instruct"  # what makes that memory, by name or path
    contexts: tuple[str, ...] = ()  # with dolphin: one for all prompts, or one for each; see CONTEXT for its place
    method: str = "greedy"  # a decoding method
    draft: str | None = None  # the model that drafts, by name or path, for methods that draft with a second one
    head: Path | None = None  # a trained head, for methods that use one (experiments.train_{acceptance,draft}_head)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # the method's own options and settings
    sampling: SamplingSettings = SamplingSettings()
    grammar: GrammarSettings = GrammarSettings()
    seed: int = 0  # prompt i samples with seed + i
    max_new_tokens: int = 128  # per prompt
    batch_size: int = 1  # prompts decoded together
    stream: bool = False  # print text as it is made (needs batch_size 1 and text output)
    output: Literal["text", "json"] = "text"
    save: Path | None = None  # also write the JSON lines here

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise ValueError("batch_size and max_new_tokens must be at least 1")
        if self.stream and (self.batch_size > 1 or self.output == "json"):
            raise ValueError("stream needs batch_size 1 and output text")
        if (self.dolphin is None) != (not self.contexts):
            raise ValueError("dolphin and contexts go together: name the pair's file, and at least one context")
        if self.dolphin is not None and self.adapter is not None:
            raise ValueError("a pair brings its own adapter: leave out adapter")


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


def read_prompts(config: DecodeConfig) -> list[str]:
    """Returns the prompts of the flags and then of the file.

    Raises:
        InputError: no prompt at all, an empty one, or a bad line in the file (named by number).
    """
    prompts = list(config.prompt)
    if config.prompts is not None:
        prompts += list(_read_lines(config.prompts))
    if not prompts:
        raise InputError("no prompts: pass --prompt TEXT (repeatable) or --prompts FILE.jsonl")
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise InputError(f"prompt {index + 1} is empty; give it some text")
    return prompts


def _read_lines(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise InputError(f"no such prompts file: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompts file {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'{path}:{number}: wanted an object like {{"prompt": "text"}}, got {line:.80}') from error
        if not isinstance(prompt, str):
            raise InputError(f"{path}:{number}: the prompt must be text, got {prompt!r:.80}")
        yield prompt


def with_contexts(config: DecodeConfig, prompts: Sequence[str]) -> tuple[str, ...]:
    """Returns the context of each prompt, none without any; raises InputError where they are not as many, or one."""
    given = config.contexts * (len(prompts) if len(config.contexts) == 1 else 1)
    if given and len(given) != len(prompts):
        raise InputError(f"contexts must be one, or one for each of {len(prompts)} prompts; got {len(given)}")
    return given


def check_method(config: DecodeConfig) -> None:
    """Raises InputError where the method is unknown, or does not go with what else is set."""
    from decoding import METHODS

    if config.method not in METHODS:
        raise unknown_name("method", config.method, METHODS)
    method = METHODS[config.method]
    if method.drafts and config.draft is None:
        raise InputError(f"method {config.method!r} drafts with a second model: name it with --draft")
    if config.draft is not None and not method.drafts:
        drafting = ", ".join(name for name, row in METHODS.items() if row.drafts)
        raise InputError(f"method {config.method!r} drafts with no second model: leave out --draft, or use {drafting}")
    if config.head is not None and not method.head:
        heads = ", ".join(name for name, row in METHODS.items() if row.head)
        raise InputError(f"method {config.method!r} has no use for a head: leave out --head, or use {heads}")
    if method.own_head and config.head is None:
        raise InputError(
            f"method {config.method!r} drafts with a trained head: name its file with --head; python -m "
            f"experiments.train_draft_head --config configs/train/{config.method}.yaml trains one"
        )
    if config.batch_size > 1 and method.shared:
        raise InputError(
            f"with method {config.method!r} the rows of a batch share a choice, and a text would depend on the prompts "
            f"beside it: set --batch_size 1, got {config.batch_size}"
        )
    grammars = [name for name, source in dataclasses.asdict(config.grammar).items() if source is not None]
    if grammars and not method.grammars:
        taking = ", ".join(name for name, row in METHODS.items() if row.grammars)
        raise InputError(f"method {config.method!r} takes no grammar.{grammars[0]}: leave it out, or use {taking}")
    given = [name for name, value in dataclasses.asdict(config.sampling).items() if value is not None]
    if given and method.temperature is None:
        raise InputError(f"method {config.method!r} takes no {given[0]}: leave it out, or use --method sample")


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
                if config.output == "json":
                    print(_json(record), flush=True)
                elif not config.stream:
                    print(f"\n>>> {record.prompt}\n{record.text}", flush=True)
                if config.output == "text":
                    for other in record.found[1:]:
                        print(f"[{other['score']:.4f}] {other['text']}", flush=True)
    if config.output == "text":
        _print_summary(config, runner, records)


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
