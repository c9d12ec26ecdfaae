"""Hooks of mkdocs: pages that lie outside of docs/ or are made from the code, and their links."""

from __future__ import annotations

import os.path
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

from njepa.commands.info import all_keys, as_typed

ROOT = Path(__file__).parents[2]
#: A file of the repository and the page that shows it.
OUTSIDE = {
    "kernels/README.md": "kernels.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def slug(title: str, separator: str) -> str:
    """GitHub's anchors, so that a link holds on both."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", separator)


def on_config(config: Any) -> Any:
    config.mdx_configs["toc"]["slugify"] = slug
    return config


def on_files(files: Files, config: Any) -> Files:
    """The pages of ``OUTSIDE``, and a table of every configuration key."""
    for source, page in OUTSIDE.items():
        text = relink((ROOT / source).read_text("utf-8"), source)
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "keys.md", content=keys_page()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = page.file.src_uri
    made = source in OUTSIDE.values() or source == "keys.md"
    return markdown if made else relink(markdown, f"docs/{source}")


def relink(text: str, source: str) -> str:
    """Links that work from ``source`` in the repository, as they work among the pages.

    Called ``[running.md]`` there, they are ``[running]`` here: a page is no file.
    """

    def link(match: re.Match[str]) -> str:
        path, hash_, anchor = match[1].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        goal = os.path.normpath(PurePosixPath(source).parent / path)
        page = OUTSIDE.get(goal, goal.removeprefix("docs/"))
        return f"]({page}{hash_}{anchor})"

    text = re.sub(r"\[([\w-]+)\.md\](?=\()", lambda name: f"[{name[1].replace('-', ' ')}]", text)
    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def keys_page() -> str:
    """Every key as ``njepa info --keys`` has it, by section."""
    lines = [
        "# All keys",
        "",
        "The keys of recipes and overrides with their defaults, as `njepa info --keys` prints "
        "them. ↻: a resumed run may change it.",
    ]
    section = None
    for key in all_keys():
        head = key.name.rpartition(".")[0].partition(".")[0] or "method"
        if head != section:
            section = head
            lines += ["", f"## {section}", ""]
        text = re.sub(r"docs/([\w-]+)\.md", r"[\1](\1.md)", key.text.replace("<", "&lt;"))
        lines += [
            f"`{key.name}` = `{as_typed(key.default)}`{' ↻' if key.free else ''}",
            f":   {text}",
            "",
        ]
    return "\n".join(lines) + "\n"
