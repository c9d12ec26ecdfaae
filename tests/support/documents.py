"""The fenced blocks of the documents, and the commands in them.

Sybil and pytest-codeblocks run blocks of Python; most of ours are commands, which are read by the
parsers of the programs they name. So this is our own, and short.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT

#: Documents whose blocks a reader copies.
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "kernels" / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


class Block(NamedTuple):
    """``text`` without the fences; ``line`` of its first line in the document."""

    line: int
    language: str
    text: str


class Command(NamedTuple):
    """``NAME=value words ...``, of which ``env`` are the first."""

    env: dict[str, str]
    words: list[str]

    def __str__(self) -> str:
        return " ".join([*(f"{k}={v}" for k, v in self.env.items()), *self.words])


def blocks(document: Path) -> list[Block]:
    text = document.read_text("utf-8")
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.M | re.S)
    return [Block(text[: m.start(2)].count("\n") + 1, m[1], m[2]) for m in found]


def commands(block: Block) -> Iterator[Command]:
    """Of ``sh``, every line; of ``console``, the lines after ``$``: what follows is output.

    Brackets around an option, ``[--kills 4]``, say that it may be left out; ``...`` is more.
    """
    text = block.text.replace("\\\n", " ")
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    for line in text.splitlines():
        line = re.sub(r"(?<=\s)\[(-[^\]]*|[A-Z]+)\]", r"\1", line)
        words = [word for word in shlex.split(line, comments=True) if word != "..."]
        env = {}
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            env[name] = value
        if words:
            yield Command(env, words)
