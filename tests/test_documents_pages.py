"""The documents: two languages that say the same, links that lead somewhere, nothing out of date."""

import re
import runpy
from pathlib import Path

import pytest
from conftest import RECIPES, ROOT
from documents import (  # noqa: F401  scratch and workshop are fixtures
    CHINESE_ONLY,
    FOLDER,
    PAIRS,
    Part,
    bare,
    counterpart,
    parts,
    run_python,
    scratch,
    workshop,
)

ENGLISH_ONLY = {"docs/scale.md"}  # for those who change the code
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md")]
EVERY = [*PAIRS, *PAIRS.values(), *(ROOT / name for name in ENGLISH_ONLY), *OTHERS]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_page_is_there_in_both_languages():
    english = {path for path in (ROOT / "docs").glob("*.md") if name_of(path) not in ENGLISH_ONLY}
    assert {counterpart(page) for page in english} == set((ROOT / "docs/zh").glob("*.md"))


def targets(page: Path, part: Part) -> list[str]:
    """Where the links of a part lead, whatever the language, but for a switch of languages."""
    back = {chinese: english for english, chinese in PAIRS.items()}
    found = []
    for link in part.links():
        if not link.startswith("http"):
            path = (page.parent / link.partition("#")[0]).resolve() if link[0] != "#" else page
            link = name_of(back.get(path, path))
        found.append(link)
    return sorted(found)


@pytest.mark.parametrize("english", PAIRS, ids=name_of)
def test_both_languages_say_the_same(english):
    chinese = PAIRS[english]
    here = parts(english)
    there = [part for part in parts(chinese) if not part.title.endswith(CHINESE_ONLY)]
    for one, other in zip(here, there, strict=True):
        where = f"{one.title} / {other.title}"
        assert other.level == one.level, where
        code = [[bare(*block) for block in part.blocks] for part in (one, other)]
        assert code[1] == code[0], f"{where}: other code"
        if english.name != "notes.md":  # test_documents_notes.py compares its rows
            assert other.names() == one.names(), f"{where}: other names"
        assert targets(chinese, other) == targets(english, one), f"{where}: other links"


def places(page: Path) -> set[str]:
    """The places on a page that a link may lead to, as GitHub makes them of headings."""
    return {re.sub(r"[^\w\s-]", "", part.title.lower()).replace(" ", "-") for part in parts(page)}


@pytest.mark.parametrize("page", EVERY, ids=name_of)
def test_its_links_lead_somewhere(page):
    for part in parts(page):
        for link in part.links():
            if link.startswith("http"):
                continue
            file, _, place = link.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), f"{part.title}: {link}"
            assert not place or place in places(path), f"{part.title}: {link}"


@pytest.mark.parametrize("page", [*PAIRS, *PAIRS.values()], ids=name_of)
def test_it_reads_as_it_is_meant(page):
    for part in parts(page):
        assert not re.search(r"^\d+\. ", part.prose, re.MULTILINE), (
            f"{part.title}: a line that begins with a number and a full stop is taken for a list"
        )


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "README.zh-CN.md"], ids=name_of)
def test_the_readme_is_short_and_leads_to_every_page(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) < 200
    linked = {path for part in parts(page) for path in targets(page, part)}
    assert {name_of(page) for page in PAIRS if page.parent != ROOT} <= linked


# ---------------------------------------------------------------------------------------------
# What is made of the code, and what has to keep up with it


def test_the_settings_are_those_of_the_code_and_all_have_a_meaning():
    made = runpy.run_path(str(ROOT / "docs/settings.py"))
    for language, path in made["PAGES"].items():
        text = path.read_text(encoding="utf-8")
        assert text == made["page"](language), "python docs/settings.py"
        assert all(made["meanings"](text).values()), f"{path}: a key without a meaning"


def test_the_recipes_are_all_in_the_table_of_results():
    (results,) = [part for part in parts(ROOT / "README.md") if part.title == "Results"]
    named = set(re.findall(r"^\| `(configs/\w+\.yaml)`", results.prose, re.MULTILINE))
    assert named == {path.relative_to(ROOT).as_posix() for path in RECIPES}


def listed(page: Path, title: str) -> list[str]:
    """The files in the first column of a part's list."""
    (part,) = [part for part in parts(page) if part.title == title]
    ((_, text),) = part.blocks
    return bare("text", text).splitlines()


def test_the_tree_has_every_file_of_the_package_and_no_other():
    tree = listed(ROOT / "CONTRIBUTING.md", "The tree")
    for name in tree:
        assert (ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file(), name
    folders = tuple(name for name in tree if name.endswith("/"))
    sources = [*ROOT.glob("*.py"), *(ROOT / "cnn").rglob("*.py")]
    sources = {path.relative_to(ROOT).as_posix() for path in sources} - {"cnn/__init__.py"}
    assert {name for name in sources if not name.startswith(folders)} <= set(tree)


def test_a_run_leaves_what_is_listed(scratch):  # noqa: F811
    words = [*FOLDER, "train.epochs=5", "checkpoint.every_epochs=5", "log.tensorboard=true"]
    assert run_python(scratch, "train.py", *words) == 0
    files = listed(ROOT / "docs/monitoring.md", "Output files")
    for name in files:
        assert Path(name).exists(), name
    left = {path.as_posix() for kind in ("logs", "checkpoints") for path in Path(kind).iterdir()}
    archives = {"logs/archive", "checkpoints/archive"}
    assert {name for name in left if "/." not in name} - archives <= {*files}
