"""What a training run says of itself: figures of its updates and their speed, held-out loss, exact answers, a trace."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.train_config import Evaluation, TrainConfig
from finetune.corpus import exact_match
from finetune.run_log import RunLog
from finetune.state import Batch, Constants, TrainState
from finetune.trainer import make_eval_step
from models.encoder_decoder import network

if TYPE_CHECKING:
    from experiments.prepared_run import Run

Figures = dict[str, float]


class CompiledStep:
    """An update that is compiled once for each shape of batch; `seconds` is what that took."""

    def __init__(self, step: Callable):
        """Keeps a jitted update."""
        self._step, self._compiled, self.seconds = step, {}, 0.0

    def __call__(self, state: TrainState, constants: Constants, batch: Batch) -> Any:
        """Makes an update."""
        return self.compiled(state, constants, batch)(state, constants, batch)

    def compiled(self, state: TrainState, constants: Constants, batch: Batch) -> Any:
        """Returns the executable for a batch of this shape."""
        shape = tuple(value.shape for value in jax.tree.leaves(batch))
        if shape not in self._compiled:
            begin = time.perf_counter()
            self._compiled[shape] = self._step.lower(state, constants, batch).compile()
            self.seconds += time.perf_counter() - begin
        return self._compiled[shape]

    def bytes(self, constants: Constants) -> int:
        """Returns what an update holds at once but for the constants, on each device: the most of all shapes."""

        def of(executable: Any) -> int:
            found = executable.memory_analysis()
            held = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
            return held - found.alias_size_in_bytes

        frozen = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(constants))
        return max(map(of, self._compiled.values())) - frozen


class Reporter:
    """Logs the figures of updates; `figures` holds the last of every kind.

    Speed is measured over the updates since the last logged one, without compiling, evaluation and saving.
    """

    def __init__(self, config: TrainConfig, run: "Run", log: RunLog):
        """Starts the clock."""
        self._config, self._run, self._log = config, run, log
        self.figures: Figures = {}
        self._start = int(run.state.step)
        self._seconds = self._tokens = 0.0
        self._updates = 0
        self._compiled = run.step.seconds
        self._mark = time.perf_counter()

    def skip(self) -> None:
        """Leaves out the time since the last call of any method here."""
        self._mark, self._compiled = time.perf_counter(), self._run.step.seconds

    def report(self, step: int, metrics: Figures) -> None:
        """Takes up the metrics of an update; logs every so many."""
        self._seconds += time.perf_counter() - self._mark - (self._run.step.seconds - self._compiled)
        self._tokens += metrics["tokens"]
        self._updates += 1
        self._trace(step)
        self._log.advance(step)
        if step % self._config.log_every == 0 or step == self._config.steps:
            figures = {f"train/{name}": value for name, value in metrics.items()}
            figures["perf/step_seconds"] = self._seconds / self._updates
            figures["perf/tokens_per_second"] = self._tokens / self._seconds
            figures["perf/compile_seconds"] = self._run.step.seconds
            self._log.figures(step, figures)
            self.figures |= figures
            self._seconds = self._tokens = 0.0
            self._updates = 0
        self.skip()

    def measured(self, step: int, figures: Figures) -> None:
        """Logs what was measured on held-out data."""
        if figures:
            self._log.figures(step, figures)
        self.figures |= figures
        self.skip()

    def _trace(self, step: int) -> None:
        """Starts and ends the trace; the first update of a run compiles and is never in it."""
        begin = max(self._config.profile.start_step, self._start + 1)
        end = min(begin + self._config.profile.num_steps, self._config.steps)
        if step == begin < end:
            jax.profiler.start_trace(str(self._config.run_dir / "profile"))
        elif step == end > begin:
            jax.profiler.stop_trace()


class Evaluator:
    """Measures what has been learnt on data that was held out: the loss, and answers that must match exactly."""

    def __init__(self, settings: Evaluation, run: "Run"):
        """Plans what is measured; nothing is compiled yet."""
        self._run, self._settings = run, settings
        self._step = make_eval_step(run.model, run.objective, run.method, run.mesh)
        self._questions = run.data.questions[: settings.examples]
        self._decode: Callable | None = None

    def __call__(self, trainable: Any) -> Figures:
        """Returns {"eval/loss": per predicted token, "eval/exact_match": share, ...}; {} where nothing is held out."""
        return {f"eval/{name}": value for name, value in {**self._loss(trainable), **self._answers(trainable)}.items()}

    def _loss(self, trainable: Any) -> Figures:
        if not self._run.held_out:
            return {}
        sums = [self._step(trainable, self._run.constants, batch) for batch in self._run.held_out]
        total = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
        tokens = total.pop("tokens")
        return {name: value / tokens for name, value in total.items()}

    def _answers(self, trainable: Any) -> Figures:
        if not self._questions:
            return {}
        shares = exact_match(self.replies(trainable), [question.example for question in self._questions])
        return {"exact_match" if task == "all" else f"exact_match/{task}": share for task, share in shares.items()}

    def replies(self, trainable: Any) -> list[str]:
        """Returns the greedy answers to the held-out prompts."""
        from decoding import make_decode_fn

        run, settings = self._run, self._settings
        if self._decode is None:
            model, stops = network(run.model.config), run.tokenizer.stop_ids
            self._decode = make_decode_fn(model, "greedy", max_new_tokens=settings.max_new_tokens, stop_tokens=stops)
        params = run.method.attach(run.constants.base, run.constants.frozen, trainable)
        contexts = [question.context for question in self._questions]
        read = {} if None in contexts else {"contexts": contexts}
        out = self._decode(params, [question.tokens for question in self._questions], **read)
        tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
        return [run.tokenizer.decode(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
