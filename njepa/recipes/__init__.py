"""Recipes: complete YAML configurations, and the reading of them.

``load_config("folder-small", ["data.path=photos", "optim.lr=5e-4"])``
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from njepa.config import Config, ConfigError, did_you_mean, parse_config


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("njepa.recipes")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def load_config(recipe: str | None = None, overrides: list[str] | None = None) -> Config:
    """Read a recipe (a name of the package or a path to a YAML file) and apply overrides.

    Args:
        recipe: None means ``shapes-tiny``.
        overrides: ``section.key=value``, the value in YAML; later ones win.

    Raises:
        ConfigError: unknown recipe or key, wrong type, impossible combination.
    """
    name = recipe or "shapes-tiny"
    raw = _read_recipe(name)
    stem = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    raw.setdefault("recipe", stem)
    for item in overrides or []:
        _apply_override(raw, item)
    return parse_config(raw, origin=f"recipe {name}")


def _read_recipe(name: str) -> dict[str, Any]:
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"--recipe {name}: no such file")
        text = path.read_text()
    else:
        known = recipe_names()
        if name not in known:
            raise ConfigError(
                f"--recipe: unknown recipe {name!r}{did_you_mean(name, known)}; "
                f"known: {', '.join(known)}, or a path that ends in .yaml"
            )
        text = (resources.files("njepa.recipes") / f"{name}.yaml").read_text()
    try:
        raw = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {name} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"recipe {name} must be a mapping of sections, got {type(raw).__name__}")
    vicreg = raw.get("vicreg")
    if isinstance(vicreg, dict) and True in vicreg:  # YAML reads a bare ``on`` as true
        vicreg["on"] = vicreg.pop(True)
    return raw


def _apply_override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"override must be section.key=value, got {item!r}")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {item!r}: the value is not YAML: {error}") from None
    *sections, last = key.removeprefix("--").split(".")
    node = raw
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {item!r}: {section!r} is not a section")
        node = child
    node[last] = value
