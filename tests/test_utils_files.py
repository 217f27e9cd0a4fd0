"""Files are the old one or the new one, never a part of either."""

import os

import pytest

from cnn.utils.files import remove_leftovers, temporary_name, write_atomically, write_text


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_file_is_replaced_whole(tmp_path):
    (tmp_path / "a").write_text("a long old text")
    write_text(tmp_path / "a", "new, 新")
    assert contents(tmp_path) == {"a": "new, 新"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_files_and_nothing_else(error, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"old {name}")

    def write(file):
        file.write(b"half of the n")
        raise error

    with pytest.raises(error):
        write_atomically(tmp_path / "a", write, also=(tmp_path / "b", tmp_path / "c"))
    assert contents(tmp_path) == {"a": "old a", "b": "old b"}


def test_nothing_is_left_over_where_the_file_cannot_be_put_in_place(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_further_names_get_the_same_content(tmp_path):
    (tmp_path / "b").write_text("old")
    also = (tmp_path / "b", tmp_path / "c")
    write_atomically(tmp_path / "a", lambda file: file.write(b"new"), also)
    assert contents(tmp_path) == dict.fromkeys("abc", "new")


def test_replacing_one_name_leaves_the_others_as_they_were(tmp_path):
    names = [tmp_path / name for name in "ab"]
    write_atomically(names[0], lambda file: file.write(b"first"), (names[1],))
    write_text(names[0], "second")
    assert contents(tmp_path) == {"a": "second", "b": "first"}
    write_atomically(names[0], lambda file: file.write(b"third"), (names[1],))
    assert contents(tmp_path) == {"a": "third", "b": "third"}


def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    write_atomically(tmp_path / "a", lambda file: file.write(b"x" * 3_000_000), (tmp_path / "b",))
    assert contents(tmp_path) == dict.fromkeys("ab", "x" * 3_000_000)


def test_what_a_crash_left_does_not_hinder_and_is_removed(tmp_path):
    (tmp_path / ".keep").write_text("")
    for name in "abc":
        temporary_name(tmp_path / name).write_text("half")
    write_atomically(tmp_path / "a", lambda file: file.write(b"new"), (tmp_path / "b",))
    remove_leftovers(tmp_path)
    assert contents(tmp_path) == {".keep": "", "a": "new", "b": "new"}
