"""``njepa info``: versions, recipes, configuration keys, what runs on this machine."""

from __future__ import annotations

import argparse

from njepa import __version__
from njepa.config import Config, Section, free_on_resume, load_config, recipe_names


def main(argv: list[str], prog: str) -> int:
    """Print it; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Print versions, recipes and what runs on this machine."
    )
    parser.add_argument(
        "--keys",
        action="store_true",
        help="print every configuration key instead: default and meaning",
    )
    args = parser.parse_args(argv)
    if args.keys:
        _print_keys(Config)
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


def _print_keys(model: type[Section], prefix: str = "") -> None:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            _print_keys(kind, f"{prefix}{name}.")
            continue
        text = " ".join((field.description or "").split())
        resume = " A resumed run may change it." if free_on_resume(f"{prefix}{name}") else ""
        print(f"{prefix}{name} = {field.default!r}\n    {text}{resume}")
