"""The documents as a site: in its menu, strict, and without a network to read them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import njepa_kernels
import pytest

from tests.support import ROOT, program_env

#: Pages that docs/_site/pages.py adds.
ADDED = {"kernels.md", "keys.md", "contributing.md", "changelog.md"}
#: What a page makes a browser fetch, as against a link that the reader may follow.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"' >]+)"""
)


def test_every_document_is_in_the_menu():
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    pages = set(re.findall(r": ([\w-]+\.md)$", nav, re.M))
    assert pages == {file.name for file in (ROOT / "docs").glob("*.md")} | ADDED


def test_the_api_page_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    missing = [name for name in njepa_kernels.__all__ if f"::: njepa_kernels.{name}" not in text]
    # `layers` are the modules of nn without arguments.
    assert missing == ["Impl", "__version__", "layers"]


@pytest.mark.parametrize(
    ("html", "found"),
    [
        ('<script src="https://unpkg.com/x"></script>', ["https://unpkg.com/x"]),
        ('<link rel="stylesheet" href=//fonts.example/a.css>', ["//fonts.example/a.css"]),
        ('<a href="https://arxiv.org/abs/2301.08243">paper</a> <img src="a.png">', []),
    ],
)
def test_fetches_are_found(html: str, found: list[str]):
    assert FETCHED.findall(html) == found


@pytest.mark.slow
def test_the_site_is_built_strictly_and_fetches_nothing(tmp_path: Path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[docs]'")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        env=program_env(NO_MKDOCS_2_WARNING="1", **nowhere), cwd=ROOT,
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not FETCHED.findall(page.read_text("utf-8")), page
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", style.read_text()), style
    api = (tmp_path / "site" / "api.html").read_text("utf-8")
    for name in ("gather_tokens", "vicreg", "load_config"):
        assert f'id="njepa_kernels.{name}"' in api or f'id="njepa.config.{name}"' in api
    assert os.listdir(tmp_path / "site" / "search") == ["search_index.json"]
