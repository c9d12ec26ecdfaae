"""Errors of a configuration, and how they are put into words."""

from __future__ import annotations

import difflib

#: Of a message.
_LINES, _CHARACTERS = 40, 4000


class ConfigError(ValueError):
    """A configuration that cannot run; the message says what it got and expected, and the fix.

    As text it fits a screen, and no name from a file or an archive controls the terminal.
    """

    def __str__(self) -> str:
        text = super().__str__()
        lines = text[:_CHARACTERS].split("\n")
        shown = "\n".join("".join(map(_printable, line)) for line in lines[:_LINES])
        return shown + " ..." * (len(text) > _CHARACTERS or len(lines) > _LINES)


def _printable(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


def did_you_mean(word: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
