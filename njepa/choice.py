"""A choice that the program made for the user, and why: loader, ops, attention, compilation."""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    """What runs, and the reason; the start table shows every choice as ``name (reason)``."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"
