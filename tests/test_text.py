"""The text of the project: length of files, width of documents, banners, trailing blanks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from tests.support import ROOT

FOLDERS = (".ci", "bench", "csrc", "docs", "kernels", "njepa", "tests")
CODE = {".py", ".cu", ".cpp", ".h", ".sh", ""}
TEXT = CODE | {".md", ".toml", ".yaml"}
#: The licence is quoted as it is.
NOT_OURS = {"LICENSE"}

LINES, WIDTH = 350, 110
#: In the first line of a longer file, before the reason why it is not split.
REASON = "Long: "
BANNER = re.compile(r"\s*(#|//).*([-=*#~_])\2{3}")

#: A rule and the files that it does not hold for.
EXCEPTIONS = {
    "length": {
        "CHANGELOG.md",  # grows by nature
    },
}


def files(suffixes: set[str]) -> Iterator[str]:
    """Paths from the root on; nothing that is built or downloaded lies in these folders."""
    found = [*ROOT.iterdir(), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*"))]
    for path in sorted(found):
        name = path.relative_to(ROOT).as_posix()
        hidden = path.name.startswith(".") or "__pycache__" in path.parts
        if path.is_file() and path.suffix in suffixes and not hidden and name not in NOT_OURS:
            yield name


def too_long(lines: list[str]) -> Iterator[str]:
    if len(lines) > LINES and REASON not in lines[0]:
        yield f"{len(lines)} lines, more than {LINES}, and no '{REASON}...' in the first"


def too_wide(lines: list[str]) -> Iterator[str]:
    """Rows of a table may be wider, because Markdown cannot break them."""
    for number, line in enumerate(lines, 1):
        if len(line) > WIDTH and not line.startswith("|"):
            yield f"line {number}: {len(line)} columns, more than {WIDTH}"


def banners(lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if BANNER.match(line):
            yield f"line {number}: a banner; split the file, or say it in a docstring"


def trailing_blanks(lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line != line.rstrip():
            yield f"line {number}: blanks at the end"
    if lines and not lines[-1].strip():
        yield "empty lines at the end"


Check = Callable[[list[str]], Iterator[str]]
RULES: dict[str, tuple[Check, set[str]]] = {
    "length": (too_long, CODE | {".md"}),
    "width": (too_wide, {".md"}),  # that of code is ruff's
    "banner": (banners, CODE),
    "blanks": (trailing_blanks, TEXT),
}


@pytest.mark.parametrize("rule", RULES)
def test_text(rule: str) -> None:
    check, suffixes = RULES[rule]
    names = [name for name in files(suffixes) if name not in EXCEPTIONS.get(rule, set())]
    assert len(names) >= 5
    found = [
        f"{name}: {what}"
        for name in names
        for what in check((ROOT / name).read_text("utf-8").split("\n")[:-1])
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        ("length", "a\n" * 351, '"""Cases. Long: one list."""\n' + "a\n" * 350),
        ("width", "a" * 111 + "\n", "|" + "a" * 111 + "\n"),
        ("banner", "    # -- values ------\n", "x = 1  # ----\n--x\n"),
        ("banner", "// ====\n", "// a == b\n"),
        ("blanks", "a \n", "a\n\nb\n"),
        ("blanks", "a\n\n", "a\n"),
    ],
)
def test_the_rules_see_what_they_forbid(rule: str, bad: str, good: str) -> None:
    check, _ = RULES[rule]
    assert len(list(check(bad.split("\n")[:-1]))) == 1
    assert list(check(good.split("\n")[:-1])) == []
