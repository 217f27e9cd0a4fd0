"""What is remembered of image files is never believed of other files than those it was learnt of."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from cnn.config import DataConfig
from cnn.datasets import cache, scan
from cnn.datasets.build import build_data


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Pictures of one value, as large as each other on the disk, with a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(scan, "CLOCK", -(10**18))  # files are believed at once
    for i, name in enumerate(["cat", "dog"] * 6):
        write(tmp_path / "photos" / name / f"{i:02}.bmp", 10 * i)
    return tmp_path / "photos"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)


def values(folder, **settings):
    """The value of each picture as the pixels in memory have it, by the path of its file."""
    data = build_data(DataConfig("folder", str(folder), **settings), 0)
    found = {}
    for images in (data.train, data.val, data.test):
        store, rows = images.store(images.files.form)
        assert (store[rows] == store[rows][:, :1, :1]).all()
        means = images.pixel_sums()[1] / 64 / 1
        assert means.sum() == pytest.approx(sum(store[row, 0, 0, 0].item() for row in rows))
        found |= {images.name(i): store[row, 0, 0, 0].item() for i, row in enumerate(rows)}
    return found


def truth(folder):
    return {str(path): np.asarray(Image.open(path))[0, 0] for path in folder.rglob("*.bmp")}


def keep_time(path, act):
    """Does something to a file and gives it the time of change that it had."""
    status = path.stat()
    act(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def swap(folder):
    first, second = folder / "cat/00.bmp", folder / "cat/02.bmp"
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def swap_folders(folder):
    (folder / "cat").rename(folder / "x")
    (folder / "dog").rename(folder / "cat")
    (folder / "x").rename(folder / "dog")


def unpack(folder):
    """Writes other pictures under the old names and times, as an archive of another version does."""
    for path in folder.rglob("*.bmp"):
        value = 255 - np.asarray(Image.open(path))[0, 0].item()
        status = path.stat()
        path.unlink()
        write(path, value)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def hard_link(folder):
    (folder / "cat/02.bmp").unlink()
    write(folder.parent / "elsewhere.bmp", 77)
    os.link(folder.parent / "elsewhere.bmp", folder / "cat/02.bmp")


def link(folder):
    write(folder.parent / "elsewhere.bmp", 78)
    (folder / "cat/02.bmp").unlink()
    (folder / "cat/02.bmp").symlink_to(folder.parent / "elsewhere.bmp")


def change_behind_link(folder):
    link(folder)
    values(folder)
    keep_time(folder.parent / "elsewhere.bmp", lambda path: write(path, 79))


CHANGES = {
    "overwrite": lambda folder: keep_time(folder / "cat/02.bmp", lambda path: write(path, 200)),
    "overwrite in place": lambda folder: keep_time(
        folder / "cat/02.bmp", lambda path: path.write_bytes(path.read_bytes()[:-64] + b"\7" * 64)
    ),
    "swap": swap,
    "swap of folders": swap_folders,
    "unpack": unpack,
    "touch": lambda folder: (folder / "cat/02.bmp").touch(),
    "rename": lambda folder: (folder / "cat/02.bmp").rename(folder / "cat/99.bmp"),
    "to another class": lambda folder: (folder / "cat/02.bmp").rename(folder / "dog/02.bmp"),
    "hard link": hard_link,
    "link": link,
    "behind a link": change_behind_link,
    "moved": lambda folder: shutil.copytree(folder, folder.parent / "new").rename(folder / "../p"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_no_pixel_and_no_mean_is_of_another_file(change, folder):
    assert values(folder) == truth(folder)
    change(folder)
    assert values(folder) == truth(folder)
    assert values(folder) == truth(folder)


def damage(path, start, new):
    data = path.read_bytes()
    path.write_bytes(data[:start] + new + data[start + len(new) :])


@pytest.mark.parametrize(
    "start, new", [(0, bytes(384)), (300, b"\xff"), (12 * 64, bytes(4)), (0, b"")], ids=str
)
def test_damaged_pixels_are_decoded_again(start, new, folder):
    expected = values(folder)
    for path in cache.cache_folder().glob(cache.PACKS):
        damage(path, start, new)
        if not new:
            path.write_bytes(path.read_bytes()[:-70])
    assert values(folder) == expected == truth(folder)


def not_read(*_):
    raise AssertionError("read again")


def test_a_file_that_has_not_changed_is_not_read_again_unless_asked_for(folder, monkeypatch):
    expected = values(folder)
    read = scan._Reader.read
    monkeypatch.setattr(scan._Reader, "read", not_read)
    assert values(folder) == expected
    with pytest.raises(AssertionError, match="read again"):
        values(folder, verify=True)
    monkeypatch.setattr(scan._Reader, "read", read)
    monkeypatch.setattr(scan, "_look_at", not_read)
    assert values(folder, verify=True) == expected, "read, and as before: not decoded"
    (folder / "cat/02.bmp").touch()
    assert values(folder) == expected, "the same bytes: not decoded"


def test_a_file_that_changed_a_moment_ago_is_read_again(folder, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    values(folder)
    monkeypatch.setattr(scan._Reader, "read", not_read)
    with pytest.raises(AssertionError, match="read again"):
        values(folder)


def test_verify_finds_what_no_time_and_no_number_tells(folder, monkeypatch):
    values(folder)
    monkeypatch.setattr(scan, "_status", lambda path: (1, 2, 3, 4))
    before = truth(folder)
    values(folder, verify=True)
    write(folder / "cat/02.bmp", 200)
    assert values(folder) == before
    assert values(folder, verify=True) == truth(folder) != before
