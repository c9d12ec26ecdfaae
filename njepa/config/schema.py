"""One run: all sections together, the defaults of each method, and what must fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import model_validator

from njepa.config.sections import (
    FREE,
    DataConfig,
    EvalConfig,
    ImplConfig,
    MaskConfig,
    ModelConfig,
    NoiseConfig,
    OnResume,
    OptimConfig,
    RunConfig,
    Section,
    VicregConfig,
    usable,
)

#: Patches a side. Attention over more than 16384 tokens is none of this trainer's tasks.
LARGEST_GRID = 128

Method = Literal["ijepa", "cjepa", "njepa", "ncjepa"]


class Config(Section):
    """One run. Sections are documented where they are defined."""

    method: Method = "njepa"
    """ijepa, cjepa (+ VICReg), njepa (+ noise) or ncjepa (both); sets the defaults of
    ``noise.weight``, ``noise.consistency``, ``noise.predictors`` and ``vicreg.weight``, explicit
    values win."""
    recipe: Annotated[str, FREE] = "custom"
    """Name of the recipe that this configuration came from, and of the run's folder in ``runs``."""
    data: DataConfig = DataConfig()
    mask: MaskConfig = MaskConfig()
    model: ModelConfig = ModelConfig()
    noise: NoiseConfig = NoiseConfig()
    vicreg: VicregConfig = VicregConfig()
    optim: OptimConfig = OptimConfig()
    run: Annotated[RunConfig, FREE] = RunConfig()
    eval: Annotated[EvalConfig, FREE] = EvalConfig()
    impl: Annotated[ImplConfig, FREE] = ImplConfig()

    @model_validator(mode="before")
    @classmethod
    def _method_defaults(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        method = raw.get("method", "njepa")
        noise = raw.get("noise")
        single = isinstance(noise, dict) and noise.get("predictors") == "single"
        noised = 0.1 if method in ("njepa", "ncjepa") else 0.0
        defaults: dict[str, dict[str, Any]] = {
            "noise": {
                "weight": noised,
                "consistency": 0.0 if single else noised,
                # With VICReg one predictor is the better one by far (docs/evidence.md, N + C).
                "predictors": "shared" if method == "ncjepa" else "unshared",
            },
            "vicreg": {"weight": 0.001 if method in ("cjepa", "ncjepa") else 0.0},
        }
        filled = dict(raw)
        for section, values in defaults.items():
            given = filled.get(section)
            if given is None or isinstance(given, dict):
                filled[section] = {**values, **(given or {})}
        return filled

    @model_validator(mode="after")
    def _check(self) -> Config:
        size, patch = self.data.image_size, self.model.patch_size
        if Path(self.recipe).name != self.recipe or not usable(Path(self.recipe)).stem.strip("."):
            raise ValueError(f"recipe must be the name of a folder in runs, got {self.recipe!r}")
        if size // patch > LARGEST_GRID:
            raise ValueError(
                f"data.image_size={size} with model.patch_size={patch} makes {size // patch} "
                f"patches a side, at most {LARGEST_GRID} are taken; raise model.patch_size"
            )
        if size % patch:
            below = size // patch * patch
            raise ValueError(
                f"data.image_size must be a multiple of model.patch_size={patch}, got {size}; "
                f"set data.image_size={below or patch} or {below + patch}"
            )
        sigma, blocks = self.noise.sigma, self.mask.n_targets
        if self.noise.active and isinstance(sigma, tuple) and len(sigma) > blocks:
            raise ValueError(
                f"noise.sigma has {len(sigma)} values, {list(sigma)}, for mask.n_targets={blocks} "
                f"blocks of an image; give at most {blocks} values or raise mask.n_targets"
            )
        if self.vicreg.weight > 0 and self.vicreg.on == "pred_blocks" and self.mask.n_targets < 2:
            raise ValueError(
                f"vicreg.on=pred_blocks compares the target blocks of an image and needs "
                f"mask.n_targets >= 2, got {self.mask.n_targets}"
            )
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row (H, W)."""
        side = self.data.image_size // self.model.patch_size
        return side, side


def fields_at(location: list[str]) -> list[str]:
    """Names of the fields of the section at ``location``; none where there is no section."""
    model: Any = Config
    for part in location:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = field.annotation if field is not None else None
    return list(model.model_fields) if hasattr(model, "model_fields") else []


def free_on_resume(key: str) -> bool:
    """Whether a resumed run may have another value of ``section.key`` (see ``OnResume``)."""
    model: Any = Config
    free = False
    for part in key.split("."):
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:  # not a key of this version, or inside of a value
            break
        marks = [mark.free for mark in field.metadata if isinstance(mark, OnResume)]
        free = marks[-1] if marks else free
        model = field.annotation
    return free
