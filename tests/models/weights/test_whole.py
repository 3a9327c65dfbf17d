import pytest

from models.errors import InputError
from models.weights.whole import whole_file, whole_folder


def test_a_folder_appears_when_the_block_ends_well(tmp_path):
    with whole_folder(tmp_path / "deep" / "m") as staging:
        (staging / "a").write_text("1")
        assert not (tmp_path / "deep" / "m").exists()
    assert (tmp_path / "deep" / "m" / "a").read_text() == "1"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["m"]


def test_a_file_appears_when_the_block_ends_well_and_the_old_one_stays_where_it_does_not(tmp_path):
    path = tmp_path / "deep" / "f"
    for text in ("1", "2"):
        with whole_file(path) as partial:
            partial.write_text(text)
            assert path.exists() == (text == "2")
        assert path.read_text() == text
    with pytest.raises(OSError, match="disk full"), whole_file(path) as partial:
        partial.write_text("half")
        raise OSError(28, "disk full")
    assert path.read_text() == "2" and [child.name for child in path.parent.iterdir()] == ["f"]


@pytest.mark.parametrize("error", [OSError(28, "disk full"), RuntimeError("a bug")])
def test_nothing_is_left_of_a_failed_one(error, tmp_path):
    with pytest.raises(InputError if isinstance(error, OSError) else RuntimeError), whole_folder(tmp_path / "m") as new:
        (new / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_only_a_folder_of_its_kind_is_replaced(tmp_path):
    for text in ("1", "2"):
        with whole_folder(tmp_path / "m", mark="a") as staging:
            (staging / "a").write_text(text)
            (staging / text).write_text("")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["2", "a"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    for mark in (None, "b"):
        with pytest.raises(InputError, match="exists already"), whole_folder(tmp_path / "m", mark=mark):
            raise AssertionError("the block must not run")
    assert (tmp_path / "m" / "a").read_text() == "2"


def test_the_old_folder_stays_where_the_new_one_fails(tmp_path):
    with whole_folder(tmp_path / "m", mark="a") as staging:
        (staging / "a").write_text("1")
    with pytest.raises(InputError, match="cannot write"), whole_folder(tmp_path / "m", mark="a") as staging:
        raise OSError("disk full")
    assert (tmp_path / "m" / "a").read_text() == "1"
