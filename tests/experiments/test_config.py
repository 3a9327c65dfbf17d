"""Layers of a config: defaults, base, file, command line; what is saved loads again."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from experiments import config as module
from experiments.config import dump_config, load_config, save_config
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Takes the likeliest token."""

    type: Literal["greedy"] = "greedy"


@dataclasses.dataclass(frozen=True)
class Beam:
    """Keeps the best few."""

    type: Literal["beam"] = "beam"
    width: int = 4  # Beams kept, 1 or more.
    options: dict[str, int | float | str | bool | list] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width must be 1 or more, got {self.width}")


@dataclasses.dataclass(frozen=True)
class Train:
    learning_rate: float = 1e-3  # Peak, per step.
    steps: int = 10
    betas: tuple[float, float] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    method: Beam | Greedy = Beam()


@dataclasses.dataclass(frozen=True)
class Config:
    method: Beam | Greedy = Beam()
    train: Train = Train(steps=7)
    prompt: tuple[str, ...] = ("default",)
    """What to continue; repeat the flag for several."""
    max_new_tokens: int = 32
    seed: int | None = None
    stream: bool = False
    output: Path | None = None
    rows: tuple[Row, ...] = ()
    second: Greedy | Beam | None = None

    def __post_init__(self):
        if self.max_new_tokens > 1000:
            raise InputError(f"max_new_tokens must be at most 1000, got {self.max_new_tokens}")


def load(*argv: str) -> Config:
    return load_config(Config, argv, prog="python -m experiments.sample", description="Does things.")


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file and returns its path as text."""

    def write_file(text: str, name: str = "a.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_file


def message(*argv: str) -> str:
    """The message of the InputError that these arguments raise."""
    with pytest.raises(InputError) as caught:
        load(*argv)
    return str(caught.value)


def test_defaults_without_arguments():
    assert load() == Config()


def test_arguments_of_the_process_are_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sample", "--max_new_tokens", "5"])
    assert load_config(Config, prog="sample", description="").max_new_tokens == 5


def test_file_over_defaults_and_flags_over_file(write):
    path = write("train: {learning_rate: 3e-4, betas: [0.8, 0.9]}\nmax_new_tokens: 64\noutput: runs/a\n")
    assert load("--config", path) == Config(
        train=Train(3e-4, 7, (0.8, 0.9)), max_new_tokens=64, output=Path("runs/a")
    )  # steps keep the value that Config, not Train, gives them
    assert load("--max_new_tokens", "5", f"--config={path}", "--train.learning_rate", "1").train.learning_rate == 1.0
    assert load("--config", path, "--max_new_tokens", "5").max_new_tokens == 5


def test_flag_overrides_one_nested_value_and_leaves_its_neighbours(write):
    path = write("method: {type: beam, width: 8, options: {a: 1}}\n")
    assert load("--config", path, "--method.width", "9").method == Beam(width=9, options={"a": 1})
    assert load("--train.steps", "3").train == Train(steps=3)


def test_base_is_one_level_and_relative_to_the_file(write, tmp_path):
    (tmp_path / "shared").mkdir()
    write("train: {steps: 1, learning_rate: 2.0}\nprompt: [a, b]\n", "shared/base.yaml")
    path = write("base: shared/base.yaml\ntrain: {steps: 5}\nprompt: [c]\n")
    assert load("--config", path) == Config(train=Train(2.0, 5), prompt=("c",))  # maps merge, lists do not


def test_base_of_a_base_is_an_error(write):
    write("seed: 1\n", "c.yaml")
    write("\nbase: c.yaml\n", "b.yaml")
    seen = message("--config", write("base: b.yaml\n"))
    assert "b.yaml:2" in seen and "One level" in seen


def test_base_must_be_a_path(write):
    assert "a.yaml:1: `base` must be the path" in message("--config", write("base: [b.yaml]\n"))


def test_errors_in_a_base_name_the_base(write):
    write("\nseed: x\n", "b.yaml")
    assert "b.yaml:2: config key 'seed'" in message("--config", write("base: b.yaml\n"))


def test_another_type_replaces_the_map_and_the_same_type_merges(write):
    write("method: {type: beam, width: 8}\n", "base.yaml")
    assert load("--config", write("base: base.yaml\nmethod: {type: greedy}\n")).method == Greedy()
    assert load("--config", write("base: base.yaml\nmethod: {options: {a: 1}}\n")).method == Beam(
        width=8, options={"a": 1}
    )
    assert load("--config", write("method: {width: 3}\n")).method == Beam(width=3)  # the default's type is kept


def test_type_on_the_command_line_chooses_the_member(write):
    assert load("--method.type", "greedy").method == Greedy()
    assert load("--second.type", "beam", "--second.width", "2").second == Beam(width=2)
    path = write("method: {type: beam, width: 8}\n")
    assert load("--config", path, "--method.type=beam").method == Beam(width=8)
    assert load("--config", path, "--method.type=greedy").method == Greedy()
    assert message("--config", path, "--method.type", "gredy") == (
        "command line: unknown method.type 'gredy'. Did you mean 'greedy'? Known: beam, greedy."
    )


def test_repeated_flags_fill_a_tuple_and_replace_the_file(write):
    path = write("prompt: [x, y]\n")
    assert load("--config", path).prompt == ("x", "y")
    assert load("--config", path, "--prompt", "A").prompt == ("A",)
    assert load("--config", path, "--prompt", "A", "--stream", "--prompt", "B").prompt == ("A", "B")
    assert load("--prompt", "A", "B", "--prompt=C").prompt == ("A", "B", "C")
    assert load("--prompt=--not-a-flag").prompt == ("--not-a-flag",)
    assert load("--prompt", "A", "--max_new_tokens", "1", "--max_new_tokens", "2").max_new_tokens == 2


def test_dashes_and_underscores_and_boolean_pairs(write):
    assert load("--max_new_tokens", "64") == load("--max-new-tokens", "64") == Config(max_new_tokens=64)
    assert load("--stream").stream is True
    path = write("stream: true\n")
    assert load("--config", path, "--no-stream").stream is load("--config", path, "--no_stream").stream is False


def test_free_form_options_by_key(write):
    path = write("method: {options: {width: 2, keep: yes}}\n")
    flags = ["--method.options.width", "5", "--method.options.rate=3e-4", "--method.options.sizes", "1", "2"]
    flags += ["--method.options.one", "[7]", "--method.options.some-name", "a: b # c", "--method.options.on", "true"]
    options = load("--config", path, *flags).method.options
    assert options == {
        "width": 5, "keep": "yes", "rate": 3e-4, "sizes": [1, 2], "one": [7], "some-name": "a: b # c", "on": True
    }  # fmt: skip
    assert type(options["width"]) is int and type(options["rate"]) is float


def test_free_form_options_need_key_and_value(write, capsys):
    assert "--method.options.width: wanted a key and a value" in message("--method.options.width")
    assert "is not a list" in message("--method.options.width", "[1,")
    path = write("method: {options: {a: 1}}\n")
    assert message("--config", path, "--method.options.a", "null") == (
        "command line: config key 'method.options.a': wanted int | float | str | bool | list, got None (NoneType)."
    )
    with pytest.raises(SystemExit, match="2"):
        load("--method.options", "a")
    assert "one key at a time" in capsys.readouterr().err


def test_config_flag_takes_one_file(write):
    assert "--config takes one YAML file, got none" in message("--config")
    assert "got a.yaml b.yaml" in message("--config", "a.yaml", "--config", "b.yaml")


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--max_new_tokn", "3"], "--max_new_tokens"),  # a close match
        (["--method.widht", "3"], "--method.width"),
        (["--max_new_tokens", "many"], "--max_new_tokens"),
        (["--max_new_tokens", "3.5"], "--max_new_tokens"),
        (["--method.width", "0"], "width must be 1 or more, got 0"),
        (["--max_new_tokens", "1001"], "max_new_tokens must be at most 1000, got 1001"),
        (["--nowhere.type", "beam"], "--nowhere.type"),
        (["--rows.type", "beam"], "--rows.type"),
        (["--train.betas", "0.5"], "--train.betas"),
        (["stray"], "stray"),
    ],
)
def test_wrong_flags_exit_with_code_2_and_a_message(argv, wanted, capsys):
    with pytest.raises(SystemExit) as caught:
        load(*argv)
    assert caught.value.code == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["method: {width: 0}\n", "rows: [{name: a}, {name: b, method: {type: beam, width: 0}}]\n"]
)
def test_post_init_errors_are_clean_and_carry_the_path(text, write):
    path = write(text)
    section = "method" if text.startswith("method") else "rows[1].method"
    assert message("--config", path) == f"{path}:1: config section '{section}': width must be 1 or more, got 0"


def test_post_init_error_of_the_whole_config(write):
    path = write("max_new_tokens: 2000\n")
    assert message("--config", path) == f"{path}: max_new_tokens must be at most 1000, got 2000"


TEXTS = ["3e-4", "yes", "null", "-x", "- x", "a:b", "#", "=", "~", "1_0", "010", "1:30", "é🙂", "[a]", "", "a\nb "]
FULL = Config(
    method=Greedy(),
    train=Train(3e-4, 0, (0.0, 1.0)),
    prompt=tuple(TEXTS),
    seed=3,
    stream=True,
    output=Path("runs/1"),
    rows=(Row("a"), Row("b", Greedy()), Row("c", Beam(width=2, options={"l": [1, 2.0, "3"], "x": 1e-7, "s": "true"}))),
    second=Beam(),
)


@pytest.mark.parametrize("config", [Config(), FULL])
def test_saved_config_loads_again_to_an_equal_one(config, tmp_path):
    save_config(config, tmp_path / "run" / "config.yaml")
    again = load("--config", str(tmp_path / "run" / "config.yaml"))
    assert again == config
    assert dump_config(again) == dump_config(config)


def test_dump_keeps_field_order_and_writes_tuples_as_lists():
    text = dump_config(Config())
    keys = [line.partition(":")[0] for line in text.splitlines() if line[0].isalpha()]
    assert keys == [field.name for field in dataclasses.fields(Config)]
    assert "prompt:\n- default\n" in text and "tuple" not in text


def test_save_leaves_the_old_file_whole_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    save_config(Config(), path)
    before = path.read_text()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(InputError, match="No space left"):
        save_config(FULL, path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]  # and no partial file


def test_save_into_an_impossible_folder_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the config"):
        save_config(Config(), tmp_path / "file" / "config.yaml")


def test_help_lists_comments_docstrings_types_and_the_values_of_the_file(write, capsys):
    with pytest.raises(SystemExit) as caught:
        load("--config", write("max_new_tokens: 77\n"), "--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert caught.value.code == 0
    for part in [
        "Does things.", "--config FILE.yaml", "--method.type is one of: beam, greedy.", "Keeps the best few.",
        "--second.type is one of: greedy, beam.", "Beams kept, 1 or more.", "What to continue; repeat the flag",
        "--max_new_tokens INT (default: 77)", "--stream", "--train.learning_rate FLOAT Peak, per step.",
        "--method.options .KEY VALUE",
    ]:  # fmt: skip
        assert part in text
