"""Plain data against annotations: strict types, unions by `type`, and errors that name path, place and value."""

import dataclasses
import math
from pathlib import Path
from typing import Literal, Optional

import pytest

from experiments.schema import build, is_free_form, item_type, parts
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class Greedy:
    type: Literal["greedy"] = "greedy"


@dataclasses.dataclass(frozen=True)
class Beam:
    type: Literal["beam"] = "beam"
    width: int = 4
    derived: int = dataclasses.field(init=False, default=0)


@dataclasses.dataclass(frozen=True)
class Train:
    learning_rate: float = 1e-3
    steps: int = 10


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    methods: tuple[Greedy | Beam, ...] = ()


@dataclasses.dataclass(frozen=True)
class Config:
    train: Train = Train()
    method: Greedy | Beam = Greedy()
    other: Greedy | Beam | None = None
    rows: tuple[Row, ...] = ()
    named: dict[str, Row] = dataclasses.field(default_factory=dict)


PLACES = {"": "x.yaml", "train": "x.yaml:3", "train.steps": "x.yaml:4", "rows": "x.yaml:9"}


MIXED = {"a": 1, "b": 1.0, "c": True, "d": "1", "e": [1, "x"]}


def message(hint, value, path="") -> str:
    with pytest.raises(InputError) as caught:
        build(hint, value, path, PLACES)
    return str(caught.value)


@pytest.mark.parametrize(
    ("hint", "value", "wanted"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float, 0.1, 0.1),
        (float, math.inf, math.inf),
        (bool, True, True),
        (str, "3", "3"),
        (Path, "a/b", Path("a/b")),
        (int | None, None, None),
        (Optional[int], 3, 3),  # noqa: UP045 (the old spelling must work too)
        (Literal["a", 2], 2, 2),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[int, ...] | None, [1], (1,)),
        (tuple[float, float], [1, 2], (1.0, 2.0)),
        (list[int], [1], [1]),
        (dict[str, int | float | bool | str | list], MIXED, MIXED),
    ],
)
def test_values_that_fit(hint, value, wanted):
    seen = build(hint, value, "k", PLACES)
    assert seen == wanted and repr(seen) == repr(wanted)  # repr: 1, 1.0 and True are equal


@pytest.mark.parametrize(
    ("hint", "value", "wanted"),
    [
        (int, "32", "wanted int, got '32' (str)"),
        (int, True, "wanted int, got True (bool)"),
        (int, 3.0, "wanted int, got 3.0 (float)"),
        (int, None, "wanted int, got None (NoneType)"),
        (float, "3e-4", "wanted float, got '3e-4' (str)"),
        (float, True, "wanted float, got True (bool)"),
        (bool, 1, "wanted bool, got 1 (int)"),
        (bool, "yes", "wanted bool, got 'yes' (str)"),
        (str, 3, "wanted str, got 3 (int)"),
        (int | None, "x", "wanted int | None, got 'x' (str)"),
        (Literal["a", "b"], "c", "wanted Literal['a', 'b'], got 'c' (str)"),
        (tuple[float, float], [1], "wanted tuple[float, float], got [1] (list)"),
        (tuple[int, ...], 3, "wanted tuple[int, ...], got 3 (int)"),
        (dict[str, int], [], "wanted dict[str, int], got [] (list)"),
    ],
)
def test_values_that_do_not_fit(hint, value, wanted):
    assert message(hint, value, "train.steps") == f"x.yaml:4: config key 'train.steps': {wanted}."


def test_errors_inside_lists_and_maps_carry_their_own_path():
    assert "config key 'k[1]': wanted int, got 'x'" in message(tuple[int, ...], [1, "x"], "k")
    assert "config key 'k.b': wanted int, got 'x'" in message(dict[str, int], {"a": 1, "b": "x"}, "k")


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (
            {"train": {"lerning_rate": 1}},
            "x.yaml:3: unknown config key 'train.lerning_rate'. Did you mean 'learning_rate'? "
            "Known: learning_rate, steps.",
        ),
        ({"trian": {}}, "x.yaml: unknown config key 'trian'. Did you mean 'train'? Known: "),
        (
            {"method": {"type": "beam", "widht": 3}},
            "unknown config key 'method.widht'. Did you mean 'width'? Known: type, width.",
        ),
        ({"method": {"type": "greedy", "width": 3}}, "unknown config key 'method.width'. Known: type."),
        ({"method": {"type": "beam", "derived": 3}}, "unknown config key 'method.derived'. "),
        ({"method": {"type": "bean"}}, "unknown method.type 'bean'. Did you mean 'beam'? Known: beam, greedy."),
        ({"method": {"type": ["beam"]}}, "unknown method.type ['beam']. "),
        ({"method": {"type": "beam", "width": "4"}}, "config key 'method.width': wanted int, got '4' (str)."),
        ({"method": {"width": 3}}, "config key 'method.type' is missing. Known: beam, greedy."),
        ({"method": "beam"}, "config key 'method': wanted a map with keys (type), got 'beam'."),
        ({"method": None}, "config key 'method': wanted a map with keys (type), got None."),
        ({"train": None}, "x.yaml:3: config key 'train': wanted a map with keys (learning_rate, steps), got None."),
        ({"rows": [{"name": "a"}, {"nam": "b"}]}, "x.yaml:9: unknown config key 'rows[1].nam'. Did you mean 'name'?"),
        ({"rows": [{}]}, "x.yaml:9: config key 'rows[0].name' is missing; it has no default."),
        (
            {"rows": [{"name": "a", "methods": [{"type": "beam", "w": 1}]}]},
            "unknown config key 'rows[0].methods[0].w'.",
        ),
        ({"named": {"a": {"name": 3}}}, "config key 'named.a.name': wanted str, got 3 (int)."),
    ],
)
def test_wrong_structure(data, wanted):
    assert wanted in message(Config, data)


def test_structures_that_fit():
    data = {
        "train": {"steps": 3},
        "method": {"type": "beam", "width": 2},
        "other": {"type": "beam"},
        "rows": [{"name": "a", "methods": [{"type": "greedy"}, {"type": "beam", "width": 1}]}],
        "named": {"x": {"name": "b"}},
    }
    assert build(Config, data, "", PLACES) == Config(
        train=Train(steps=3),
        method=Beam(width=2),
        other=Beam(),
        rows=(Row("a", (Greedy(), Beam(width=1))),),
        named={"x": Row("b")},
    )
    assert build(Config, {"other": None}, "", PLACES) == Config()


def test_post_init_errors_keep_their_words():
    @dataclasses.dataclass(frozen=True)
    class Even:
        n: int = 0

        def __post_init__(self):
            if self.n % 2:
                raise ValueError(f"n must be even, got {self.n}")

    assert message(Even, {"n": 3}, "train") == "x.yaml:3: config section 'train': n must be even, got 3"
    assert message(Even, {"n": 3}) == "x.yaml: n must be even, got 3"


def test_parts_name_sections_before_their_fields():
    names = [name for name, _ in parts(Config(method=Beam()))]
    assert names[:3] == ["train", "train.learning_rate", "train.steps"]
    assert "method.width" in names and "method.width" not in [name for name, _ in parts(Config())]


def test_kinds_of_types():
    assert item_type(tuple[int, ...]) is item_type(list[int] | None) is int
    assert item_type(tuple[int, int]) is item_type(int) is item_type(dict[str, int]) is None
    assert is_free_form(dict[str, int | str]) and is_free_form(dict[str, int] | None)
    assert not is_free_form(dict[str, Row]) and not is_free_form(dict[str, Greedy | Beam]) and not is_free_form(int)
