"""docs/notes.md: each of the sixty things that the course notes ask for is where the row says."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from documents import run_command, run_python, scratch, workshop  # noqa: F401

ENGLISH, CHINESE = ROOT / "docs/notes.md", ROOT / "docs/zh/notes.md"
TOOLS = ("grep", "tail", "head", "cut", "cat", "ls")  # run by the shell
LOOK = 'python -c "(.*)"'


def rows(path: Path) -> list[list[str]]:
    """The cells of the numbered rows."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [
        re.split(r" (?<!\\)\| ", line.strip("| ")) for line in lines if re.match(r"\| \d", line)
    ]
    return [[cell.strip().replace("\\|", "|") for cell in cells] for cells in found]


def commands(row: list[str]) -> list[str]:
    return re.findall(r"`([^`]+)`", row[3])


def test_both_languages_have_the_sixty_rows_with_the_same_commands():
    here, there = rows(ENGLISH), rows(CHINESE)
    assert [int(row[0]) for row in here] == [int(row[0]) for row in there] == list(range(1, 61))
    for one, other in zip(here, there):
        assert len(one) == len(other) == 4 and commands(one) == commands(other) != [], one[0]
        names = [set(re.findall(r"`([^`]+)`", row[2])) for row in (one, other)]
        assert names[0] == names[1], f"row {one[0]}: other names"
    for path in (ENGLISH, CHINESE):
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).is_file(), link


def shell(line: str) -> None:
    done = subprocess.run(line, check=False, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), f"{line}: {done.stdout}{done.stderr}"


def test_every_row_runs(scratch, capfd):  # noqa: F811
    for name in ("cnn", "examples", "train.py", ".gitignore"):
        if not Path(name).exists():
            os.symlink(ROOT / name, name)
    shutil.rmtree("logs"), shutil.rmtree("checkpoints")
    for row in rows(ENGLISH):
        for line in commands(row):
            try:
                if line.startswith(TOOLS):
                    shell(line)
                elif looked := re.fullmatch(LOOK, line):
                    exec(looked[1], {})  # noqa: S102  the document's own words
                    assert capfd.readouterr().out.strip(), line
                elif line == "python train.py --print-config":
                    assert run_python(scratch, "train.py", "--print-config") == 0
                else:
                    run_command(scratch, line)
            except BaseException as error:  # noqa: BLE001  with the row
                pytest.fail(f"row {row[0]}: {line}: {error!r}\n{capfd.readouterr().err[-1500:]}")
            capfd.readouterr()
