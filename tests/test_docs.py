"""The pages: links lead somewhere, commands name keys and files that exist, lines stay readable."""

import re
from pathlib import Path

import pytest

from config.config import DATASETS, config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "data/README.md", "bench/*.md")
    for page in ROOT.glob(pattern)
)
KEYS = {*config, *(key for entry in DATASETS.values() for key in entry)}
COMMAND = re.compile(r"(python|torchrun|sbatch) |\./\w+\.sh\b|[A-Z_]+=\S+ ")
FOLDERS = {path.parent for path in ROOT.glob("[!.]*/*.py")}
PROGRAMS = {path.name for folder in FOLDERS for path in folder.rglob("*.py")}
PROGRAM = r"(?<!--config )(?<![$\w./-])[\w./-]+\.(?:py|sh)\b"
# with a folder: people have texts of their own
TEXT = r"(?<![$\w./-])[\w.-]+/[\w./-]+\.(?:md|toml|txt)\b"
# programs of the projects that people come from, and stand-ins for names of theirs
THEIRS = {
    "bundle_images_into_rec.py",
    "convert.py",
    "eval.py",
    "eval_ijbc.py",
    "main.py",
    "torch2onnx.py",
    "train_v2.py",
    "train/train_X.py",
    "./run_X.sh",
}
# a link, an address or a table row cannot be wrapped
UNBREAKABLE = re.compile(r"^\||https?://")


def outside_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", outside_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def commands(page: Path) -> list[str]:
    """The command lines of a page's code blocks, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0] for line in lines if COMMAND.match(line.strip())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", outside_code(page)):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_what_exists(page):
    for command in commands(page):
        without_config = re.sub(r"--config \S+", "", command)
        for script in re.findall(r"(?<!\S)(?:\./)?([\w/]+\.(?:py|sh))\b", without_config):
            assert (ROOT / script).is_file(), command
        unknown = {key for key in re.findall(r"\s([a-zA-Z]\w*)=", command) if key not in KEYS}
        # variables of the shell before the script are capitals
        assert not {key for key in unknown if not key.isupper()}, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    """Programs by path or by name alone; texts, of which people have their own, by path."""
    for name in set(re.findall(f"{PROGRAM}|{TEXT}", page.read_text())) - THEIRS:
        places = (ROOT / name, page.parent / name, ROOT / "tests" / name)
        assert name in PROGRAMS or any(place.is_file() for place in places), name


def test_tests_that_start_processes_are_listed():
    listed = set(re.findall(r"`([\w/]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text()))
    tests = ROOT / "tests"
    for file in tests.rglob("test_*.py"):
        marked = "pytest.mark.processes" in file.read_text() and file != Path(__file__).resolve()
        assert (str(file.relative_to(tests)) in listed) == marked, file


def test_every_folder_has_its_line():
    lines = (ROOT / "README.md").read_text().splitlines()
    described = {line.split("/ ")[0] for line in lines if re.match(r"[\w/]+/ +\S", line)}
    assert {folder.name for folder in FOLDERS} - {"utils"} <= described
    assert all((ROOT / name).is_dir() for name in described - {"output"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_at_most_100_columns(page):
    long = [line for line in page.read_text().splitlines() if len(line) > 100]
    assert all(UNBREAKABLE.search(line) for line in long)


def test_the_readme_takes_three_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
