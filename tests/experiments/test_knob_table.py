"""The table of context against knowledge on a tiny model: its page, what is kept of it, its direction."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import decode, knob_pages, knob_runs, knob_table, reproduce
from experiments.knob_config import KnobClaim, KnobTableConfig
from finetune.context_tasks import FAMILIES, conversation, items, prompt, split
from models.errors import InputError
from tests.support.tiny_folder import write_tiny_folder

TABLE = """
type: knob
table: context_knob
families: [next]
contexts: 1
known_only: false
run:
  adapter: {type: lora, rank: 2}
  batch_size: 4
  length: 192
  packing: false
  evaluation: {every: 0, batches: 0, examples: 0}
presets:
  smoke: {steps: 2, train: 8, test: 4, search: 2, direction_steps: 3, layers: [0.5]}
paper: {tuned: "85 to 95%"}
claims:
  - {text: "it turns", row: direction, measure: turned, least: -1.0}
  - {text: "it follows", row: tuned, measure: pairs, least: 2.0}
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("knob")
    model = write_tiny_folder(folder / "model", max_length=256)
    (folder / "table.yaml").write_text(TABLE + f"model: {model}\n")
    argv = [str(folder / "table.yaml"), "--preset", "smoke", "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
        reproduce.main(argv)
    return argv, folder / "out", model


def test_the_page_has_all_parts(table):
    _, out, _ = table
    page = (out / "table.md").read_text()
    assert "it turns: **reproduced** here" in page and "it follows: **not reproduced** here" in page
    assert "85 to 95%" in page and "| to context |" in page and "| to knowledge |" in page
    with (out / "table.csv").open() as file:
        found = {(row["row"], row["measure"]): float(row["value"]) for row in csv.DictReader(file)}
    assert {"untuned", "tuned", "steered, untuned", "steered, tuned"} <= {row for row, _ in found}
    assert all(0 <= value <= 1 for (_, measure), value in found.items() if measure.startswith("turned"))
    assert (out / "plot.png").is_file()


def test_what_is_finished_is_kept(table, monkeypatch):
    argv, out, _ = table
    before = (out / "table.md").read_text()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(out / "xla"))
    monkeypatch.setattr(knob_table.KnobRuns, "choose", None)
    for name in ("intents", "search", "direction", "steer"):
        monkeypatch.setattr(knob_table, name, None)
    reproduce.main(argv)
    assert (out / "table.md").read_text() == before


def test_the_saved_direction_is_an_option_of_the_method_and_of_its_model_alone(table, tmp_path):
    _, out, model = table
    options = {"direction": str(out / "direction.safetensors"), "strength": 2.0}
    config = decode.DecodeConfig(model=str(model), prompt=("a",), method="knob", options=options, max_new_tokens=2)
    runner = decode.Runner(config)
    assert len(runner.decode(["a"], [0])[0].token_ids) <= 2
    assert np.isclose(np.linalg.norm(runner.decode_fn.plan.options.direction), 1, atol=1e-4)
    other = write_tiny_folder(tmp_path / "other", seed=5)
    with pytest.raises(InputError, match="the direction in .* belongs to 'model'"):
        decode.Runner(decode.DecodeConfig(model=str(other), prompt=("a",), method="knob", options=options))


def test_items_say_something_else_than_what_is_known():
    made = items(FAMILIES, 2, 0)
    assert len(made) > 200 and {item.family for item in made} == set(FAMILIES)
    for item in made:
        assert item.said != item.known and item.answer("use") == item.said and item.answer("ignore") == item.known
        if item.family == "arithmetic":
            inner, value = item.context.rstrip(".").split(" = ")
            query = item.query.removeprefix("What is ").rstrip("?")
            assert eval(query) == int(item.known) and eval(query.replace(inner, value)) == int(item.said)
        else:
            assert item.said in item.context and item.known not in item.context.split(" is ")[-1].rstrip(".").split()
    train, test = split(made, 0.3, 0)
    assert not {item.query for item in train} & {item.query for item in test} and len(train) + len(test) == len(made)
    use, ignore = (conversation(made[0], intent) for intent in ("use", "ignore"))
    assert use[0] == ignore[0] and use[1] != ignore[1] and use[2]["content"] != ignore[2]["content"]
    assert made[0].context not in prompt(made[0], None, with_context=False)[1]["content"]
    with pytest.raises(InputError, match="family of context tasks"):
        items(["captials"], 1, 0)
    for contexts in (0, 99):
        with pytest.raises(InputError, match=f"contexts of a query must be at .*; got 99|at least 1, got {contexts}"):
            items(["next"], contexts, 0)


def test_known_is_what_is_preferred_among_the_answers_of_a_family(monkeypatch):
    """Whatever else the model would rather say."""
    made = items(["next"], 1, 0)[:6]
    answers = {item.known: place for place, item in enumerate(made)}
    logits = np.full((knob_runs.BATCH, 10), -1.0, np.float32)
    logits[:, 9] = 5.0
    logits[np.arange(6), np.arange(6)] = [1.0, 1.0, -2.0, 1.0, -2.0, 1.0]
    runs = knob_runs.KnobRuns(KnobTableConfig())
    monkeypatch.setattr(runs, "token", answers.get)
    read = SimpleNamespace(logits=logits), np.arange(knob_runs.BATCH)
    monkeypatch.setattr(runs, "reads", lambda name, rows: read)
    assert runs.known(made) == [made[place] for place in (0, 1, 3, 5)]
    assert not any(runs.first_tokens("untuned", [(prompt(item, None), item.known) for item in made]))


def test_figures_by_hand():
    assert knob_table._shares([True, True, False], [True, False, False]) == {
        "use": 2 / 3,
        "ignore": 1 / 3,
        "pairs": 1 / 3,
        "items": 3,
    }
    assert knob_table._auc(np.array([1.0, 2.0]), np.array([0.0, 0.5])) == 1
    assert knob_table._auc(np.array([0.0, 2.0]), np.array([1.0, 1.0])) == 0.5
    made = items(["next"], 1, 0)[:4]
    texts = [made[0].known, made[1].known + ".", made[2].said, "nothing"]
    assert knob_table._memory_share(texts, made) == pytest.approx(2 / 3)
    rows = {"direction, layer 3": {"turned": 0.5}, "direction, layer 4": {"turned": 0.75}}
    claim = KnobClaim("it turns", "direction", "turned", 0.7)
    assert "**reproduced** here (0.750" in knob_pages.answer(claim, rows, 4)
    assert "**not reproduced** here (0.500" in knob_pages.answer(claim, rows, 3)
    rows["direction, layer 4"]["count"] = 8
    assert "**within the noise** here (0.750" in knob_pages.answer(claim, rows, 4)
    assert "not measured" in knob_pages.answer(KnobClaim("x", "tuned", "pairs"), rows, 4)
