"""YAML of others: plain values of bounded size, or one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from njepa.config.messages import ConfigError

#: Characters that are read; the largest recipe has 3 thousand. yaml takes seconds for more.
LARGEST = 1 << 18


class _Loader(yaml.SafeLoader):
    """Without aliases: ten lines of them stand for gigabytes for whoever walks the tree."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"aliases are not accepted; write the value out{mark}")
        return super().compose_node(parent, index)


def read_yaml(text: str, what: str) -> Any:
    """The value that ``text`` holds: no Python objects (tags), no aliases.

    Raises:
        ConfigError: it is not YAML, too long, or nested too deeply; begins with ``what``.
    """
    if len(text) > LARGEST:
        raise ConfigError(f"{what} is not YAML that is read here: over {LARGEST} characters")
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigError(f"{what} is not YAML that is read here: nested too deeply") from None
    except Exception as error:  # a tag on a value that it does not fit raises almost anything
        raise ConfigError(f"{what} is not YAML: {error}") from None


def read_yaml_file(path: Path, what: str) -> Any:
    """``read_yaml`` of a file.

    Raises:
        ConfigError: as there, or it cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} cannot be read: {error}") from None
    return read_yaml(text, what)
