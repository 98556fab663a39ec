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
        for script in re.findall(r"(?<!\S)(?:\./)?([\w/]+\.(?:py|sh))\b", command):
            assert (ROOT / script).is_file(), command
        unknown = {key for key in re.findall(r"\s([a-zA-Z]\w*)=", command) if key not in KEYS}
        # variables of the shell before the script are capitals
        assert not {key for key in unknown if not key.isupper()}, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_at_most_100_columns(page):
    long = [line for line in page.read_text().splitlines() if len(line) > 100]
    assert all(UNBREAKABLE.search(line) for line in long)


def test_the_readme_takes_three_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
