"""Errors of a configuration, and how they are put into words."""

from __future__ import annotations

import difflib


class ConfigError(ValueError):
    """A configuration that cannot run; the message says what it got and expected, and the fix."""


def did_you_mean(word: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
