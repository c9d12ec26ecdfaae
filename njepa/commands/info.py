"""``njepa info``: versions, recipes, configuration keys, what runs on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from njepa import __version__
from njepa.commands.parsers import command_parser
from njepa.config import Config, Section, free_on_resume, load_config, recipe_names

EPILOG = """For example:

  njepa info
  njepa info --keys | grep ema
"""


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser(prog, "Print versions, recipes and what runs on this machine.", EPILOG)
    keys = "print every configuration key instead, with its default and meaning"
    result.add_argument("--keys", action="store_true", help=keys)
    return result


def main(argv: list[str], prog: str) -> int:
    """Print it; returns the exit status."""
    args = parser(prog).parse_args(argv)
    if args.keys:
        for key in all_keys():
            resume = " A resumed run may change it." if key.free else ""
            print(f"{key.name} = {as_typed(key.default)}\n    {key.text}{resume}")
        return 0
    import njepa_kernels
    import torch

    print(
        f"njepa {__version__}, torch {torch.__version__}, CUDA device: "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}"
    )
    print("\nfused ops:")
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}  # ops that the same things run
    for op, impls in njepa_kernels.available_impls().items():
        alike.setdefault(tuple(impls.items()), []).append(op)
    for rows, ops in alike.items():
        print(f"  {', '.join(ops)}")
        print("".join(f"    {impl}: {why}\n" for impl, why in rows), end="")
    print("\nrecipes:")
    for name in recipe_names():
        c = load_config(name, ["data.path=."])
        patches = f"{c.model.encoder}/{c.model.patch_size} at {c.data.image_size} px"
        print(f"  {name}: {c.method}, {patches}, {c.optim.epochs} epochs")
    print("\n`njepa info --keys` lists every configuration key.")
    return 0


def as_typed(value: Any) -> str:
    """A default as an override would give it: YAML, a float in six digits at most."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_typed, value))}]"
    if isinstance(value, float):
        return min(repr(value), f"{value:.6g}", key=len) if len(repr(value)) > 8 else repr(value)
    return value if isinstance(value, str) else json.dumps(value)


class Key(NamedTuple):
    """A key of the configuration; ``free``: a resumed run may change it."""

    name: str
    default: Any
    text: str
    free: bool


def all_keys(model: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key, section after section; its text is the docstring of its field."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from all_keys(kind, f"{prefix}{name}.")
            continue
        text = " ".join((field.description or "").split())
        key = f"{prefix}{name}"
        yield Key(key, field.default, text, free_on_resume(key))
