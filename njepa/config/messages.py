"""Errors of a configuration, and how they are put into words."""

from __future__ import annotations

import difflib
import logging
import sys

#: Of a message.
_LINES, _CHARACTERS = 40, 4000


class ConfigError(ValueError):
    """A configuration that cannot run; the message says what it got and expected, and the fix.

    As text it fits a screen, and no name from a file or an archive controls the terminal.
    """

    def __str__(self) -> str:
        text = super().__str__()
        lines = text[:_CHARACTERS].split("\n")
        left_out = len(text) > _CHARACTERS or len(lines) > _LINES
        return printable("\n".join(lines[:_LINES])) + " ..." * left_out


def printable(text: str) -> str:
    """``text`` with everything escaped that would control a terminal, but for line breaks."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_stderr(level: int = logging.WARNING) -> None:
    """Log lines on stderr; names of files in them are ``printable``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("%(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def did_you_mean(word: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
