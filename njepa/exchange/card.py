"""The model card that goes with exported weights: what they are, where from, how to load them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from njepa import __version__
from njepa.config.reading import read_yaml
from njepa.exchange.weights import EncoderWeights, Weights

#: Sections of a run's configuration that decided its weights.
_RECIPE = ("data", "mask", "model", "noise", "vicreg", "optim")
#: Fields that say where files lay on somebody's machine; a card is there to be published.
_PRIVATE = {"data": ("path", "eval_path", "cache_dir"), "model": ("init_from",)}


def model_card(
    encoder: EncoderWeights, weights: Weights, library: str, usage: str, holds: str, checked: str
) -> str:
    """README.md with the front matter that Hugging Face reads.

    Args:
        holds: what the files hold, and under which names.
        checked: the comparison with our own features, as it came out.
    """
    tags = ["image-feature-extraction", "self-supervised", "jepa"]
    front = yaml.safe_dump({"library_name": library, "tags": tags}, sort_keys=False)
    mean, std = ([round(x, 6) for x in values] for values in (encoder.mean, encoder.std))
    record = weights.record
    lines = [
        f"---\n{front}---",
        f"# {'An' if encoder.which == 'only' else encoder.which.capitalize()} encoder, "
        f"ViT {encoder.width} x {encoder.depth}, patch {encoder.patch_size}, "
        f"{encoder.image_size} px",
        holds,
        f"Checked when it was written: {checked}.",
        "## Use",
        f"```python\n{usage.strip()}\n```",
        f"Images: RGB, shorter side to 8/7 of {encoder.image_size}, bilinear with antialiasing, "
        f"central {encoder.image_size} x {encoder.image_size}; pixels in [0, 1], then mean {mean} "
        f"and std {std}. Features of an image: the mean over all {_patches(encoder)} patches.",
        "## Architecture",
        f"Vision Transformer without class token: width {encoder.width}, {encoder.depth} blocks, "
        f"{encoder.heads} heads, MLP {encoder.hidden}, patch {encoder.patch_size}, LayerNorm eps "
        f"1e-6, exact GELU, position table fixed, final LayerNorm.",
        "## Origin",
        _origin(weights),
    ]
    if record.get("summary"):
        lines += ["## Measured at the end of the run", _metrics(record["summary"])]
    if record.get("config"):
        lines += ["## Configuration", f"```yaml\n{_recipe(record['config'])}```"]
    return "\n\n".join(lines) + "\n"


def code_revision() -> str:
    """The git revision of this code, ``+`` where it was changed, or the version alone."""
    here = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        if git("ls-files", "__init__.py") != "__init__.py":  # somebody else's repository
            return f"njepa {__version__}"
        changed = git("status", "--porcelain", "--untracked-files=no", ".")
        return f"njepa {__version__}, git {git('rev-parse', 'HEAD')[:12]}{'+' if changed else ''}"
    except (OSError, subprocess.CalledProcessError):
        return f"njepa {__version__}"


def _origin(weights: Weights) -> str:
    record = weights.record
    if "recipe" not in record:
        name = Path(weights.origin).name
        return (
            f"Converted from `{name}` by {code_revision()}. The licence of the source holds for "
            f"these weights too (Meta's I-JEPA weights: CC BY-NC 4.0)."
        )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"Recipe {record['recipe']}, method {record['method']}, {record['step']} steps; trained "
        f"with {versions}. Data: {_data(record)}. Exported by {code_revision()}."
    )


def _data(record: dict[str, Any]) -> str:
    path = read_yaml(record["config"], "the configuration")["data"]["path"]
    name = "the embedded set shapes" if path is None else f"`{Path(path).name}`"
    return f"{name} (index digest {record['data_digest'][:12]})"


def _metrics(summary: dict[str, Any]) -> str:
    rows = ["| | |", "|---|---|"]
    for key, value in summary.items():
        interval = summary.get(f"{key}_ci95")
        if interval is not None:
            rows.append(f"| {key} | {value} % (95 %: {interval[0]} to {interval[1]}) |")
        elif isinstance(value, int | float | str) and not isinstance(value, bool):
            rows.append(f"| {key} | {value} |")
    return "\n".join(rows)


def _recipe(text: str) -> str:
    config = read_yaml(text, "the configuration")
    kept = {
        section: {
            key: value
            for key, value in config[section].items()
            if key not in _PRIVATE.get(section, ())
        }
        for section in _RECIPE
        if section in config
    }
    dumped: str = yaml.safe_dump({"method": config["method"], **kept}, sort_keys=False)
    return dumped


def _patches(encoder: EncoderWeights) -> int:
    return (encoder.image_size // encoder.patch_size) ** 2
