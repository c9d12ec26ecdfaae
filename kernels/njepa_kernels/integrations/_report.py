"""What ``accelerate`` did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """``replaced``: name -> what it runs now. ``left``: name -> why it was left alone."""

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: {what}" for name, what in self.replaced.items()]
        lines += [f"{name}: left alone, {why}" for name, why in self.left.items()]
        return "\n".join(lines)
