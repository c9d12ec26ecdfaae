"""From recipes and ``section.key=value`` to a ``Config``, and back to YAML.

``load_config("folder-small", ["data.path=photos", "optim.lr=5e-4"])``
A key that exists nowhere is an error that names the nearest existing one.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from njepa.config.messages import ConfigError, did_you_mean
from njepa.config.reading import read_yaml, read_yaml_file
from njepa.config.schema import Config, fields_at

#: What the DeepSpeed file owns. Named here so that a recipe that sets one of them gets told where.
DS_OWNED = {
    "batch_size", "train_batch_size", "train_micro_batch_size_per_gpu", "micro_batch_size",
    "gradient_accumulation_steps", "accumulation", "zero_stage", "zero", "zero_optimization",
    "bf16", "fp16", "precision", "dtype", "amp", "torch_autocast",
    "gradient_clipping", "clip_grad", "grad_clip",
}  # fmt: skip

#: Keys that the noise section had before the paper could be read: what took their place.
RETIRED = {
    "schedule": "noise.sigma takes a number, 'edm' or a list",
    "levels": "noise.sigma takes a list with one number a level",
    "sigma_min": "noise.sigma takes a number, 'edm' or a list",
    "sigma_max": "noise.sigma takes a number, 'edm' or a list",
    "sigmas": "noise.sigma takes the list",
    "rho": "noise.sigma takes a list; write the values of the grid there",
    "jitter": "noise.sigma=edm draws log-normal sigmas",
    "anneal_to": "sigma is constant over the training, as published",
    "unit": "sigma is in the unit of the position table; model.pos_scale scales that",
    "map": "noise.draw says what blocks share; sigma belongs to a block",
    "mix": "the noise is added to the position, which is not scaled, as published",
    "level_weights": "all blocks weigh the same, as published",
    "normalise": "the loss is the weighted sum of its terms, as published",
    "level_embedding": "the predictor is not told sigma, as published",
}  # fmt: skip


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
    name = "shapes-tiny" if recipe is None else recipe  # an empty one is a variable left unset
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
        raw = read_yaml_file(path, f"--recipe {name}") or {}
    else:
        known = recipe_names()
        if name not in known:
            raise ConfigError(
                f"--recipe: unknown recipe {name!r}{did_you_mean(name, known)}; "
                f"known: {', '.join(known)}, or a path that ends in .yaml"
            )
        text = (resources.files("njepa.recipes") / f"{name}.yaml").read_text()
        raw = read_yaml(text, f"recipe {name}")
    if not isinstance(raw, dict):
        raise ConfigError(f"recipe {name} must be a mapping of sections, got {type(raw).__name__}")
    vicreg = raw.get("vicreg")
    if isinstance(vicreg, dict) and True in vicreg:  # YAML reads a bare ``on`` as true
        vicreg["on"] = vicreg.pop(True)
    return raw


def _apply_override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"override must be section.key=value, got {item!r}; files are given by --ds_config "
            f"and --recipe"
        )
    value = read_yaml(text, f"override {item!r}: the value") if text else None
    *sections, last = key.removeprefix("--").split(".")
    node = raw
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {item!r}: {section!r} is not a section")
        node = child
    node[last] = value


def parse_config(raw: dict[str, Any], origin: str = "configuration") -> Config:
    """Validate a mapping of sections; every problem found is named at once."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {_explain(e)}" for e in error.errors()]
        raise ConfigError("\n".join([f"{origin} is not valid:", *lines])) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that ``load_config`` reads back to an equal one."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    where = ".".join(location) or "configuration"
    kind, got = error["type"], error.get("input")
    if kind == "extra_forbidden":
        key = location[-1]
        if key in DS_OWNED:
            return f"{where}: belongs to the DeepSpeed file (--ds_config), not to the recipe"
        if location[:-1] == ["noise"] and key in RETIRED:
            return f"{where}: removed: the published method has none; {RETIRED[key]}"
        known = list(fields_at(location[:-1]))
        home = [s for s in fields_at([]) if key in fields_at([s])]
        moved = f"; {key} lives in section {home[0]!r}" if home else ""
        return f"{where}: unknown key{did_you_mean(key, known) or moved}; known: {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return str(message)  # the validators above name their keys
    message = message.replace("a valid tuple", "a list such as [0.5,1.0]")
    return f"{where}: {message[0].lower()}{message[1:]}, got {got!r:.200}"
