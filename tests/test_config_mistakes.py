"""Two hundred configurations spoilt at random: each refused, each by name, none with a traceback."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RECIPES, ROOT

FILES = RECIPES
KEY_LINE = re.compile(r"^( *)([a-z_]+):(.*)$")

# Values that no key takes, whatever its kind. Not 'open: a comment's apostrophe would close it.
NO_VALUE = ["{a: 1, b: [}", "[1, 2", '"open', "!!python/object/apply:os.system [ls]", "!tag x",
            "&anchor 3", "*alias", '"\\0"', "\x01", "@at", "`tick`", "%percent", "a: b: c"]  # fmt: skip
# For numbers, switches and choices.
NO_SCALAR = ["[]", "{a: b}", "!!str 3", "maybe so", "1e", "0x1F", "-1e400", "12:30:45", "'7'"]


def lines_with_keys(lines: list[str]) -> list[int]:
    return [number for number, line in enumerate(lines) if KEY_LINE.match(line)]


def misspell(lines: list[str], draw: random.Random) -> str:
    number = draw.choice(lines_with_keys(lines))
    indent, key, rest = KEY_LINE.match(lines[number]).groups()
    spot = draw.randrange(len(key))
    new = key[:spot] + draw.choice("xyzq_") + key[spot:]
    lines[number] = f"{indent}{new}:{rest}"
    return new


def spoil_value(values: list[str]) -> Callable[[list[str], random.Random], str]:
    def spoil(lines: list[str], draw: random.Random) -> str:
        number = draw.choice(
            [n for n in lines_with_keys(lines) if values is NO_VALUE or takes_no_text(lines[n])]
        )
        indent, key, _ = KEY_LINE.match(lines[number]).groups()
        lines[number] = f"{indent}{key}: {draw.choice(values)}"
        return f"{key}|line {number + 1}|:{number + 1}|:{number + 2}|:{number + 3}"

    return spoil


def takes_no_text(line: str) -> bool:
    value = KEY_LINE.match(line).group(3).split("#")[0].strip()
    return re.fullmatch(r"[\d.e+-]+|true|false", value) is not None


def twice(lines: list[str], draw: random.Random) -> str:
    number = draw.choice(lines_with_keys(lines))
    lines.insert(number, lines[number])
    return KEY_LINE.match(lines[number]).group(2)


def move_to_the_top(lines: list[str], draw: random.Random) -> str:
    number = draw.choice([n for n in lines_with_keys(lines) if re.match(r"  \w+: [^ #]", lines[n])])
    line = lines.pop(number).strip()
    lines.insert(0, line)
    return line.partition(":")[0]


def break_the_indent(lines: list[str], draw: random.Random) -> str:
    """Of a key with another before it in the same section."""
    inner = [n for n in lines_with_keys(lines) if re.match(r"  \w", lines[n])]
    number = draw.choice([n for n in inner if n - 1 in inner])
    key = KEY_LINE.match(lines[number]).group(2)
    lines[number] = draw.choice(["\t", " ", "   ", "     "]) + lines[number].strip()
    return rf"{key}|:{number}|:{number + 1}|:{number + 2}"


def flood(lines: list[str], draw: random.Random) -> str:
    """Ten levels deep is still a configuration, a thousand is not."""
    number = draw.choice(lines_with_keys(lines))
    indent, key, _ = KEY_LINE.match(lines[number]).groups()
    depth = draw.choice([21, 100, 5_000])
    lines[number] = f"{indent}{key}: {'[' * depth}{draw.choice(['', ']' * depth])}"
    return f":{number + 1}: "


KINDS = [misspell, spoil_value(NO_VALUE), spoil_value(NO_SCALAR), twice, move_to_the_top,
         break_the_indent, flood]  # fmt: skip


def test_two_hundred_spoilt_configurations_are_refused_by_name(train, capfd):
    draw, wrong = random.Random(6), []
    for number in range(200):
        source = draw.choice(FILES)
        lines = source.read_text(encoding="utf-8").splitlines()
        expected = draw.choice(KINDS)(lines, draw)
        text = "\n".join(lines).replace("base: ", f"base: {ROOT}/configs/") + "\n"
        Path("bad.yaml").write_text(text, encoding="utf-8")
        status = train("--config", "bad.yaml", "--print-config")
        said = capfd.readouterr()
        good = (
            status == 2
            and not said.out
            and "Traceback" not in said.err
            and re.search(r"^error: bad\.yaml:\d+: ", said.err)
            and re.search(expected, said.err)
        )
        if not good:
            wrong.append((number, source.name, expected, status, said.err[:200]))
    assert not wrong, "\n".join(map(str, wrong))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)

TEXTS = {
    "a billion laughs": (LAUGHS.encode(), "bad.yaml:1: anchors and aliases"),
    "an anchor": (b"seed: &here 3\n", "bad.yaml:1: anchors and aliases (& *) are not allowed"),
    "a tag": (b"seed: 1\nrun: !!python/name:os.system\n", "bad.yaml:2: tags (!) are not allowed"),
    "a call": (b"data: !!python/object/apply:os.system [touch x]\n", "bad.yaml:1: tags"),
    "ten megabytes": (b"seed: 1 # " + b"x" * 10_000_000, "a file of more than 100,000 bytes"),
    "binary": (bytes(range(256)) * 9, "bad.yaml:"),
    "zeros": (bytes(9_000), "bad.yaml:1: not valid YAML: the character 0x0"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "got the byte 0xff; save it as UTF-8"),
    "UTF-16 without a mark": ("seed: 1\n".encode("utf-16-le"), "0x0; write UTF-8 without"),
    "another after a mark": (b"\xef\xbb\xbfrun: a\n\xe9\n", "bad.yaml:2: expected UTF-8 text, got the byte 0xe9"),
    "another encoding": ("seed: 1\nrun: caf\xe9\n".encode("latin-1"), "bad.yaml:2: expected UTF-8"),
    "deep": (b"[" * 50_000, "bad.yaml:1: nested deeper than 20 levels"),
    "deep by indent": (b"".join(b" " * n + b"a:\n" for n in range(200)), "nested deeper than"),
    "a list": (b"- 1\n- 2\n", "bad.yaml:1: expected `section:`"),
    "a word": (b"hello", "bad.yaml:1: expected `section:`"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "bad.yaml:2: not valid YAML"),
    "a key that is a list": (b"? [a, b]\n: 1\n", "bad.yaml:1: expected a plain key, got a list"),
    "a merge": (b"data:\n  <<: {name: x}\n", "bad.yaml:2: data.<<: no such key"),
    "itself as base": (b"base: bad.yaml\n", "the files name each other in a circle"),
    "a base of zeros": (b'base: "a\\0b"\n', "bad.yaml:1: base: expected a file"),
    "a zero in a path": (b'data:\n  root: "a\\0b"\n', "bad.yaml:2: data.root: expected text, got"),
    "a zero in args": (b'data:\n  args: {a: "\\0"}\n', "bad.yaml:2: data.args: expected plain"),
    "a huge number": (b"seed: " + b"9" * 5_000 + b"\n", "bad.yaml:1: seed: expected a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("data, expected", TEXTS.values(), ids=TEXTS)
def test_hostile_yaml_is_refused(train, capfd, data, expected):
    Path("bad.yaml").write_bytes(data)
    assert train("--config", "bad.yaml", "--print-config") == 2
    said = capfd.readouterr().err
    assert expected in said and "Traceback" not in said and len(said) < 500


@pytest.mark.parametrize("path", ["/dev/zero", ".", "nothing.yaml"])
def test_what_is_no_configuration_file_is_refused(train, capfd, path):
    assert train("--config", path, "--print-config") == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: {path}: ") and "Traceback" not in said
