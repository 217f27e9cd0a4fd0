"""The rooms of cnn/: what lies where, and which way the imports go."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from cnn.utils.run_folder import CHECKPOINTS, EXPORTS, OWNER, RunLogs

# Each may import itself and those before it; scripts may import all.
ORDER = [
    *("errors", "config", "utils", "cli", "metrics", "datasets", "models", "training"),
    *("records", "drill", "inference", "sweeps"),
]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "cnn").rglob("*.py")
}
LONGEST = 50


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Every module that is imported, wherever the line stands, and the name out of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, None) if inner in MODULES else (node.module, alias.name)


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_the_rooms_are_those_of_the_order():
    assert {room_of(module) for module in MODULES if module != "cnn"} == set(ORDER)
    assert len(list((ROOT / "cnn").glob("*.py"))) <= 8, "modules that lie flat"


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"cnn"}))
def test_imports_go_one_way_and_take_no_private_names(module):
    tree, room = tree_of(MODULES[module]), room_of(module)
    others = set()  # what modules of other rooms are called here
    for other, name in imports(tree):
        assert other.split(".")[0] not in SCRIPTS, f"{other} is a script"
        if not other.startswith("cnn."):
            continue
        assert ORDER.index(room_of(other)) <= ORDER.index(room), f"{other} comes after {room}"
        if room_of(other) != room:
            assert name is None or not name.startswith("_"), f"{other} keeps {name} to itself"
            others.add(other.rpartition(".")[2] if name is None else name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            assert owner not in others, f"{owner} keeps {node.attr} to itself"


def test_no_module_comes_back_to_itself():
    graph = {
        module: {other for other, _ in imports(tree_of(path)) if other in MODULES}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join([*way, module])
        if module not in done:
            for other in sorted(graph[module]):
                follow(other, (*way, module))
            done.add(module)

    for module in sorted(graph):
        follow(module, ())


def test_no_function_is_longer_than_a_screen():
    too_long = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in [*MODULES.values(), *ROOT.glob("*.py")]
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST
    ]
    assert not too_long


def test_only_the_run_folder_knows_the_names_of_a_runs_files():
    names = {path.name for path in RunLogs(Path()).paths()} | {OWNER, "archive"}
    names |= {f"{name}{ending}" for name in CHECKPOINTS for ending in (".pth", *EXPORTS.values())}
    names -= {"tensorboard"}  # a package and a setting are called so too
    elsewhere = [
        f"{path.relative_to(ROOT).as_posix()}: {node.value}"
        for path in [*MODULES.values(), *ROOT.glob("*.py")]
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and " " not in node.value  # prose
        and Path(node.value).name in names
    ]
    allowed = {
        "cnn/sweeps/settings.py: config.yaml",  # the file that a sweep begins from
        "cnn/cli.py: configs/config.yaml",
    }
    here = "cnn/utils/run_folder.py"
    assert {line for line in elsewhere if not line.startswith(here)} == allowed


def test_no_file_of_a_run_is_named_beside_the_run_folder():
    """`logs.folder / "x"` would be a file that is neither archived nor found again."""
    by_hand = re.compile(r"(logs\.folder|folder\.checkpoints) / (?!ARCHIVE)")
    for module, path in MODULES.items():
        if module != "cnn.utils.run_folder":
            assert not by_hand.search(path.read_text(encoding="utf-8")), module
