"""Tests of the table of named models: what each entry promises, without any network."""

import dataclasses
import re

import pytest

from models.weights.registry import DEFAULT_MODEL, MODELS, WheelMember, numbered_parts

FILES = [(name, file) for name, entry in MODELS.items() for file in entry.files]
FILE_IDS = [f"{name}:{file.path}" for name, file in FILES]


def test_names():
    """The promised models exist under their own names, the default among them."""
    assert set(MODELS) == {
        "smollm2-135m-instruct",
        "qwen2.5-coder-1.5b-instruct",
        "qwen2.5-coder-0.5b-instruct",
        "gemma3-270m",
        "all-minilm-l6-v2",
    }
    assert DEFAULT_MODEL in MODELS
    assert all(entry.name == name and entry.summary and entry.license for name, entry in MODELS.items())


@pytest.mark.parametrize(("name", "file"), FILES, ids=FILE_IDS)
def test_file_is_well_formed(name, file):
    """Every file has a checkable hash, a plausible size, a path inside the folder and at least one wheel."""
    assert re.fullmatch("[0-9a-f]{64}", file.sha256)
    assert file.bytes > 0
    assert not file.path.startswith("/") and ".." not in file.path.split("/")
    assert file.parts and len(set(file.parts)) == len(file.parts)
    if file.hub is not None:
        assert re.fullmatch("[0-9a-f]{40}", file.hub.revision), "a branch can move; pin a commit"
        assert file.hub.repo.count("/") == 1
        assert file.hub.filename.rsplit("/", 1)[-1] == file.path.rsplit("/", 1)[-1]


@pytest.mark.parametrize("name", MODELS)
def test_paths_and_hashes_are_told_apart(name):
    """No two files of a model share a path or a hash (a row copied and half edited would)."""
    files = MODELS[name].files
    assert len({file.path for file in files}) == len({file.sha256 for file in files}) == len(files)


def test_sizes_of_the_published_files():
    """The sizes are those of the publishers' files; a change here means another file under the same name."""
    sizes = {name: sum(file.bytes for file in entry.files) for name, entry in MODELS.items()}
    assert sizes["smollm2-135m-instruct"] == 98_362_432
    assert sizes["qwen2.5-coder-1.5b-instruct"] == 1_117_320_768
    assert sizes["qwen2.5-coder-0.5b-instruct"] == 491_400_064


@pytest.mark.parametrize(
    ("name", "count"), [("qwen2.5-coder-1.5b-instruct", 22), ("qwen2.5-coder-0.5b-instruct", 6), ("gemma3-270m", 4)]
)
def test_parts_are_numbered_without_gaps(name, count):
    """A file in parts has each part once, in rising order, both in the package's name and in the member's."""
    (file,) = MODELS[name].files
    packages = [int(re.search(r"part(\d+)$", part.package).group(1)) for part in file.parts]
    members = [int(re.search(r"part(\d+)(\.bin)?$", part.member).group(1)) for part in file.parts]
    assert packages == list(range(1, count + 1))
    assert [number - members[0] for number in members] == list(range(count))


def test_numbered_parts():
    """`part` counts from 1 and `index` from 0, in the package and in the member."""
    assert numbered_parts(2, "toy-part{part}", "1.0", "toy_part{part}/x.{index:02d}") == (
        WheelMember("toy-part1", "1.0", "toy_part1/x.00"),
        WheelMember("toy-part2", "1.0", "toy_part2/x.01"),
    )


def test_entries_are_frozen():
    """An entry cannot be changed by accident."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODELS[DEFAULT_MODEL].name = "other"
