"""The table of context against knowledge (2411.07404): intents before and after tuning, the layers, the direction.

A model is tuned by LoRA to use or to ignore a context as it is told; patched runs say in which layers the intent is; a
direction is learned behind each candidate layer and held against a random one, the difference of the means, and the
whole stream; and the best one steers, without any instruction, the tuned model and the untuned one. Only questions
are asked whose right answer the untuned model prefers without a context. Everything that is finished is kept.
"""

from typing import Any, NamedTuple

from experiments.knob_config import KnobTableConfig
from experiments.knob_runs import BATCH, INTENTS, Figures, KnobRuns
from finetune.context_tasks import Item, prompt


class Measured(NamedTuple):
    """What the table shows: figures by row, the layers of each direction of patching, the direction that was saved."""

    rows: dict[str, Figures]
    searches: dict[str, Figures]
    chosen: Figures


def measure(config: KnobTableConfig) -> Measured:
    """Measures what is missing."""
    runs = KnobRuns(config)
    train, test = runs.kept("items", runs.choose)["items"]
    train, test = ([Item(*item) for item in side] for side in (train, test))
    runs.tune(train)
    rows = {name: runs.kept(name, lambda name=name: intents(runs, name, test)) for name in ("untuned", "tuned")}
    searches = runs.kept("layers", lambda: search(runs, train))
    depth, candidates = runs.depth, {int(share * runs.depth) for share in config.size.layers}
    candidates |= {min(found["stop"], depth) - 1 for found in searches.values()}
    found = {}
    for layer in sorted(candidates):
        found[layer] = runs.kept(f"direction-{layer}", lambda layer=layer: direction(runs, layer, train, test))
        shown = {name: value for name, value in found[layer].items() if name != "unit"}
        rows |= {f"direction, layer {layer}": shown}
    best = max(found, key=lambda layer: found[layer]["turned_train"])
    chosen = runs.kept("steering", lambda: steer(runs, best, found[best]["unit"], train, test))
    rows |= chosen.pop("rows")
    save(runs, best, found[best])
    return Measured(rows, searches, chosen)


def intents(runs: KnobRuns, name: str, test: list[Item]) -> Figures:
    """Returns how often a model follows each intent when it is told to."""
    rows = [(prompt(item, intent), item.answer(intent)) for item in test for intent in INTENTS]
    right = runs.first_tokens(name, rows)
    return _shares(right[::2], right[1::2])


def search(runs: KnobRuns, train: list[Item]) -> Figures:
    """Returns the layers that carry the intent, in both directions of patching."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from finetune.knob import patched_chances, search_layers

    model, params, _ = runs.model("tuned")
    last, answers, _ = runs.pairs(train, runs.size.search)
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
        found[name] = search_layers(run, min(base, 0.5), runs.depth)._asdict()
    return found


def direction(runs: KnobRuns, layer: int, train: list[Item], test: list[Item]) -> Figures:
    """Returns a learned direction, and how many answers it and others turn on held-out pairs."""
    import jax.numpy as jnp
    import numpy as np

    from finetune.knob import continued, exchanged, train_direction

    model, params, _ = runs.model("tuned")
    last, answers, _ = runs.pairs(train, runs.size.train)
    steps = runs.size.direction_steps
    unit, losses = train_direction(model, params, layer, last, answers, steps=steps, seed=runs.config.seed)
    means = [np.asarray(last.hidden[layer, side::2], np.float32).mean(axis=0) for side in (0, 1)]
    random = np.random.default_rng(runs.config.seed).standard_normal(len(unit)).astype(np.float32)
    held, wanted, confident = runs.pairs(test, runs.size.test)

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
        "count": len(wanted),
    }


def steer(runs: KnobRuns, layer: int, unit: list[float], train: list[Item], test: list[Item]) -> Figures:
    """Returns how the direction steers prompts without an instruction, strengths chosen on those trained on."""
    import jax.numpy as jnp
    import numpy as np

    from decoding.knob import coordinate, steered
    from finetune.knob import continued

    u = jnp.asarray(unit, jnp.float32)
    model, params, _ = runs.model("tuned")
    open_rows = [(prompt(item, None), item.said) for item in train[: runs.size.test]]
    known = np.array([runs.token(item.known) for item in train[: runs.size.test]])
    last, said = runs.reads("tuned", open_rows)
    told = runs.pairs(train, runs.size.test)[0].hidden[layer]  # half of them to use the context, half to ignore it
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
    rows = {f"steered, {name}": steering(runs, name, layer, unit, use, ignore, test) for name in ("untuned", "tuned")}
    return {"layer": layer, "use": use, "ignore": ignore, "deviation": float(along.std()), "rows": rows}


def steering(
    runs: KnobRuns, name: str, layer: int, unit: list[float], use: float, ignore: float, test: list[Item]
) -> Figures:
    """Returns how often a model follows the knob, by the decoding method, and how often its memory without it."""
    from decoding import make_decode_fn

    model, params, tokenizer = runs.model(name)
    fn = make_decode_fn(
        model, "knob", max_new_tokens=8, stop_tokens=tokenizer.stop_ids, layer=layer, direction=tuple(unit)
    )
    prompts = [runs.ids(prompt(item, None)) for item in test]

    def words(strength: float) -> list[str]:
        found: list[str] = []
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            out = fn(params, part + part[:1] * (BATCH - len(part)), strength=strength)
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


def save(runs: KnobRuns, layer: int, figures: Figures) -> None:
    """Writes the chosen direction, with the hash of the model."""
    import numpy as np

    from finetune.adapters.saved import base_of
    from finetune.knob import SavedDirection, save_direction

    numbers = {name: float(value) for name, value in figures.items() if name != "unit"}
    bases = [base_of(runs.config.model, runs.model(name)[1]) for name in ("untuned", "tuned")]
    saved = SavedDirection(layer, np.asarray(figures["unit"], np.float32), numbers, *bases)
    save_direction(runs.config.folder / "direction.safetensors", saved)


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
