"""The documents: links, anchors and commands lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from njepa.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "kernels" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = r"^```.*?^```"
PLACES = r"(?:njepa|kernels|csrc|bench|tests|docs)/[\w./-]+\.(?:py|md|sh|json|yaml|cu|cpp|h)"


def _anchors(document: Path) -> set[str]:
    """GitHub's anchors: lower case, no punctuation, hyphens for blanks."""
    text = re.sub(FENCE, "", document.read_text("utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_links_and_anchors(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8"))
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        goal = (document.parent / path) if path else document
        if not goal.exists() or (anchor and anchor not in _anchors(goal)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_files_that_are_named_exist(document: Path) -> None:
    named = re.findall(rf"(?<![\w/.-]){PLACES}", document.read_text("utf-8"))
    assert not [path for path in named if not (ROOT / path).exists()]


def _is_module(name: str) -> bool:
    path = (ROOT / "kernels" if name.startswith("njepa_kernels") else ROOT) / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_commands_exist(document: Path) -> None:
    text = document.read_text("utf-8")
    fences = re.findall(FENCE, text, re.M | re.S)
    spans = re.findall(r"`[^`]+`", re.sub(FENCE, "", text, flags=re.M | re.S))
    code = "\n".join([*fences, *(span.strip("`") for span in spans)])
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = " ".join(re.findall(r"^\.PHONY:(.*)$", makefile, re.M)).split()
    commands = re.findall(r"^(?:\$ )?njepa ([a-z]+)", code, re.M)
    made = re.findall(r"^make ([a-z][a-z-]*)", code, re.M)
    modules = re.findall(r"python -m\s+((?:njepa|bench)[\w.]*)", code)
    assert not [name for name in commands if name not in COMMANDS]
    assert not [name for name in made if name not in targets]
    assert not [name for name in modules if not _is_module(name)]
