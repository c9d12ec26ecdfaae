"""Typed configuration; ``njepa.recipes`` reads it from YAML and ``section.key=value``.

The recipe owns everything except what the DeepSpeed file owns (batch size, accumulation, ZeRO,
precision, clipping). A key that exists nowhere is an error that names the nearest existing one.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Method = Literal["ijepa", "cjepa", "njepa", "ncjepa"]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Range = tuple[float, float]
#: YAML reads a bare ``off`` as false.
_Off = BeforeValidator(lambda value: "off" if value is False else value)

#: What the DeepSpeed file owns. Named here so that a recipe that sets one of them gets told where.
DS_OWNED = {
    "batch_size", "train_batch_size", "train_micro_batch_size_per_gpu", "micro_batch_size",
    "gradient_accumulation_steps", "accumulation", "zero_stage", "zero", "zero_optimization",
    "bf16", "fp16", "precision", "dtype", "amp", "torch_autocast",
    "gradient_clipping", "clip_grad", "grad_clip",
}  # fmt: skip


#: In a recipe: the user must give this value.
UNSET = "???"


class ConfigError(ValueError):
    """A configuration that cannot run; the message says what was got, expected and how to mend."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _increasing(name: str, values: Range, low: float, high: float = math.inf) -> None:
    if not low < values[0] <= values[1] <= high:
        bound = f"{low:g} < low <= high" + (f" <= {high:g}" if high < math.inf else "")
        raise ValueError(f"{name} must be [low, high] with {bound}, got {list(values)}")


class DataConfig(Section):
    path: Path | None = None
    """Image folder, list file (.txt), tar shard (.tar) or folder of tar shards. None: the embedded
    set ``shapes``."""
    eval_path: Path | None = None
    """Labelled test images (class folders, or a list or shards with labels), for kNN and linear
    probe; ``path`` then needs labels too."""
    backend: Literal["auto", "dali", "torch"] = "auto"
    """``auto``: DALI on a GPU where it is installed, torchvision otherwise."""
    image_size: PositiveInt = 224
    """Side of the square crop, in pixels."""
    crop_scale: Range = (0.3, 1.0)
    """Area of the random crop as a fraction of the image's area."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the random crop before it is resized to a square."""
    hflip: Fraction = 0.0
    """Probability of a left-right flip."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted per channel, for pixels in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divides per channel."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Loader processes (torchvision) or threads (DALI) per rank. None: on a GPU the cores of this
    machine shared among its ranks, at most 16; on a CPU one. 0: decode in the training process
    (torchvision only)."""
    prefetch: PositiveInt = 2
    """Batches decoded ahead, per worker (torchvision) or in all (DALI)."""
    hw_decoder_load: Fraction = 0.65
    """Share of the JPEGs that DALI gives to the GPU's hardware decoder, where there is one (A100,
    H100, H200); the rest is decoded by its CUDA kernels. DALI's default."""
    cache_dir: Path | None = None
    """Where the index of a source and the embedded set are kept. None: ``~/.cache/njepa``."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if str(self.path) == UNSET:
            raise ValueError(
                "data.path is not set, and this recipe has no images of its own; add "
                "data.path=FOLDER"
            )
        if self.path is None and self.eval_path is not None:
            raise ValueError(
                f"data.eval_path={self.eval_path} needs data.path, got none; the embedded set "
                f"brings its own test images: unset data.eval_path, or add data.path=FOLDER"
            )
        _increasing("data.crop_scale", self.crop_scale, low=0.0, high=1.0)
        _increasing("data.crop_ratio", self.crop_ratio, low=0.0)
        if min(self.std) <= 0:
            raise ValueError(f"data.std must be positive, got {self.std}")
        return self


class MaskConfig(Section):
    """Multi-block masks (docs/method.md, section 2)."""

    compat: Literal["fixed", "upstream"] = "fixed"
    """``upstream``: the published sampler with its quirks; ``fixed``: every patch can be context
    and target, truncation without a preference for the top rows."""
    context_scale: Range = (0.85, 1.0)
    """Area of the context block as a fraction of the grid."""
    target_scale: Range = (0.15, 0.2)
    """Area of each target block as a fraction of the grid."""
    aspect_ratio: Range = (0.75, 1.5)
    """Height over width of the target blocks."""
    n_targets: PositiveInt = 4
    """Target blocks per image (M)."""
    min_keep: Annotated[int, Field(ge=0)] = 10
    """Every block, and what is left of the context block, has more patches than this (upstream) or
    at least one more (fixed): both mean ``> min_keep``."""
    allow_overlap: bool = False
    """Keep target patches in the context."""
    ragged: bool = False
    """Every image keeps all of its context patches, instead of as many as the image of the batch
    with the fewest. More tokens per step, and per image another number (docs/running.md)."""
    static_shapes: bool = False
    """Fix the number of context patches beforehand for each pair of block sizes, at its mean, so
    that a run has few shapes; images with too short a context (about one in a batch) are drawn
    anew. For ``run.compile``. Not with ``ragged``."""

    @model_validator(mode="after")
    def _check(self) -> MaskConfig:
        _increasing("mask.context_scale", self.context_scale, low=0.0, high=1.0)
        _increasing("mask.target_scale", self.target_scale, low=0.0, high=1.0)
        _increasing("mask.aspect_ratio", self.aspect_ratio, low=0.0)
        if self.ragged and self.static_shapes:
            raise ValueError(
                "mask.static_shapes gives every image the same number of context patches and "
                "mask.ragged gives each its own, got both true; set one of them to false"
            )
        return self


class PredictorConfig(Section):
    depth: PositiveInt = 6
    """Transformer blocks."""
    width: PositiveInt = 384
    """Token width d; a multiple of 4 and of ``heads``."""
    heads: PositiveInt | None = None
    """Attention heads. None: as many as the encoder, as published."""
    context: Literal["per_block", "shared"] = "per_block"
    """``per_block``: every target block has a context of its own, which attends to its queries too,
    as published. ``shared``: the context attends to itself only and is computed once per image for
    all blocks and levels; less work, another model (docs/method.md, section 1.3)."""

    @model_validator(mode="after")
    def _check(self) -> PredictorConfig:
        if self.width % 4:
            raise ValueError(
                f"model.predictor.width must be a multiple of 4 (2-D sin-cos positions), "
                f"got {self.width}; the nearest is {self.width // 4 * 4 or 4}"
            )
        return self


class ModelConfig(Section):
    encoder: str = "vit_base"
    """vit_tiny, vit_small, vit_base, vit_large, vit_huge or vit_giant."""
    patch_size: PositiveInt = 16
    """Side of a patch in pixels; divides ``data.image_size``."""
    width: PositiveInt | None = None
    """Overrides the encoder's token width D."""
    depth: PositiveInt | None = None
    """Overrides the encoder's number of blocks."""
    heads: PositiveInt | None = None
    """Overrides the encoder's number of attention heads."""
    attention: Literal["auto", "sdpa", "xformers", "varlen"] = "auto"
    """What computes the attention. ``sdpa``: torch's scaled_dot_product_attention; ``varlen``:
    torch's kernel for packed sequences (CUDA, bf16); ``xformers``: that of mslk or xformers (CUDA).
    ``auto``: sdpa, with ``mask.ragged`` the first of varlen, xformers and sdpa that works here."""
    predictor: PredictorConfig = PredictorConfig()
    init: Literal["trunc_normal", "xavier"] = "trunc_normal"
    """``trunc_normal``: std 0.02, as published. ``xavier``: uniform, gain ``init_gain``; narrow
    networks start almost linear under 0.02 (docs/small-scale.md)."""
    init_gain: Annotated[float, Field(gt=0)] = 1.0
    """Gain of the Xavier initialisation; no effect on ``trunc_normal``."""
    depth_rescaled_init: bool = False
    """Divide the output projections of block l by sqrt(2 l). The published code does so and then
    re-draws every linear layer, so its effective value is false."""
    pos_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the encoder's and predictors' frozen sin-cos tables (published: 1)."""
    checkpoint_blocks: bool = False
    """Keep only the input of each block of the context encoder and the predictors for the backward,
    and compute the rest again there: the same gradients, less memory, about a third more
    arithmetic."""


class NoiseConfig(Section):
    """Noise on the position embedding of masked tokens: N-JEPA, our reading (docs/method.md)."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    """λ, the weight of the noised loss beside the clean one. 0: no noise, no second predictor.
    ``method`` sets 1 for njepa and ncjepa."""
    predictors: Literal[1, 2] = 2
    """2: predictor 1 is clean, predictor 2 sees the noise. 1: one predictor, all blocks noised,
    no clean loss."""
    levels: PositiveInt = 4
    """K, the number of noise levels."""
    schedule: Literal["karras", "edm_lognormal", "linear", "cosine", "vp", "fixed", "list"] = (
        "karras"
    )
    """How the K standard deviations are spaced."""
    sigma_min: Annotated[float, Field(ge=0)] = 0.05
    """Smallest σ (karras, linear, cosine, vp)."""
    sigma_max: Annotated[float, Field(ge=0)] = 2.0
    """Largest σ (karras, linear, cosine, vp), and the value of ``fixed``."""
    rho: Annotated[float, Field(gt=0)] = 7.0
    """Curvature of the Karras grid."""
    sigmas: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """The values of ``schedule: list``."""
    jitter: bool = False
    """``edm_lognormal``: draw σ inside the level's quantile bin rather than at its middle, which
    makes σ log-normal exactly."""
    anneal_to: Annotated[float, Field(gt=0)] | None = None
    """Final factor on all σ, reached linearly over the training; None: constant."""
    unit: Literal["absolute", "relative"] = "absolute"
    """``relative``: σ is in multiples of the RMS of the position table."""
    map: Literal["per_block", "per_token", "per_sample", "per_batch", "all"] = "per_block"
    """What shares a level. ``per_block``: the levels are permuted over the target blocks of each
    image; ``all``: each block is predicted at every level (K times the queries)."""
    mix: Literal["ve", "vp", "edm"] = "ve"
    """``ve``: ψ + σn; ``vp``: (ψ + σn)/√(1+σ²); ``edm``: σ_d/√(σ²+σ_d²)·(ψ + σn), σ_d = 1/√2."""
    space: Literal["predictor", "encoder_tied"] = "predictor"
    """``encoder_tied``: the noise is drawn in the encoder's width and projected by the predictor's
    own context projection without its bias (StoP)."""
    level_weights: Literal["uniform", "inv", "edm"] | tuple[float, ...] = "uniform"
    """w_k: 1, 1/(1+σ²/σ_d²), EDM's λ(σ) clamped to 10, or a list of K numbers."""
    normalise: bool = False
    """Divide the sum of the clean and the noised loss by 1 + λ."""
    level_embedding: Literal["none", "add"] = "none"
    """``add``: a zero-initialised projection of ln(σ)/4 is added to the queries."""

    @model_validator(mode="after")
    def _check(self) -> NoiseConfig:
        if self.sigma_min > self.sigma_max:
            raise ValueError(
                f"noise.sigma_min must not exceed noise.sigma_max, "
                f"got {self.sigma_min} > {self.sigma_max}"
            )
        if self.schedule in ("karras", "cosine", "vp") and self.sigma_min == 0:
            raise ValueError(
                f"noise.schedule={self.schedule} needs noise.sigma_min > 0, got 0; "
                f"use noise.schedule=linear or list for a level without noise"
            )
        if self.schedule == "list":
            if self.sigmas is None or len(self.sigmas) != self.levels:
                raise ValueError(
                    f"noise.schedule=list needs noise.sigmas with noise.levels={self.levels} "
                    f"numbers, got {self.sigmas}"
                )
        elif self.sigmas is not None:
            raise ValueError(
                f"noise.sigmas has an effect with noise.schedule=list only, "
                f"got noise.schedule={self.schedule}"
            )
        if self.schedule == "fixed" and self.levels != 1:
            raise ValueError(
                f"noise.schedule=fixed has one level, got noise.levels={self.levels}; "
                f"set noise.levels=1"
            )
        if self.jitter and self.schedule != "edm_lognormal":
            raise ValueError(
                f"noise.jitter needs noise.schedule=edm_lognormal, got {self.schedule}"
            )
        weights = self.level_weights
        if isinstance(weights, tuple) and (len(weights) != self.levels or min(weights) < 0):
            raise ValueError(
                f"noise.level_weights needs noise.levels={self.levels} numbers >= 0, got {weights}"
            )
        return self


class VicregConfig(Section):
    """VICReg on top of the prediction loss: C-JEPA (docs/method.md, section 5)."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    """β_vicreg. 0: no VICReg and no projector. ``method`` sets 0.001 for cjepa and ncjepa."""
    sim: Annotated[float, Field(ge=0)] = 25.0
    """Weight of the invariance term."""
    std: Annotated[float, Field(ge=0)] = 25.0
    """Weight of the variance hinge."""
    cov: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the covariance term."""
    gamma: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation that the hinge asks for."""
    eps: Annotated[float, Field(gt=0)] = 1e-4
    """Added to the variance inside the root."""
    on: Literal["pred_blocks", "pred_vs_target", "context", "tokens"] = "pred_blocks"
    """Which tensors: means of predicted blocks (as published), those against the target's block
    means, means of context tokens, or all predicted tokens."""
    projector: tuple[PositiveInt, ...] | Literal["identity"] | None = None
    """Widths of the Linear-BN-ReLU projector (last one linear). None: (D, D, D)."""


class OptimConfig(Section):
    epochs: PositiveInt = 600
    """Length of the training and of all schedules, in passes over the data."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 15
    """Linear warm-up of the learning rate, in epochs."""
    lr_start: Annotated[float, Field(ge=0)] = 1e-4
    """Learning rate at the start of the warm-up."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate after the warm-up; not scaled by the batch size."""
    lr_final: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the end of the cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    """Weight decay at the start; biases and norms have none."""
    weight_decay_final: Annotated[float, Field(ge=0)] = 0.4
    """Weight decay at the end (increasing cosine)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9, 0.999,
    )  # fmt: skip
    """AdamW's moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator offset."""
    ema: tuple[Fraction, Fraction] = (0.996, 1.0)
    """Momentum of the target encoder at the first and the last step, linear in between."""
    schedule_scale: Annotated[float, Field(ge=1)] = 1.0
    """Stretch of the cosine and EMA schedules beyond ``epochs`` (published ``ipe_scale``)."""


class RunConfig(Section):
    dir: Path | None = None
    """Run folder. None: ``runs/<recipe>``."""
    resume: bool = False
    """Continue the run in ``dir`` from its last checkpoint."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The one seed behind weights, order, crops, masks, levels and noise."""
    max_steps: PositiveInt | None = None
    """Length of the training and of all schedules in steps; overrides ``optim.epochs``."""
    stop_after: PositiveInt | None = None
    """Write a checkpoint and stop after this global step, as if interrupted (schedules keep their
    full length)."""
    log_every: PositiveInt = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: PositiveInt | None = None
    """Steps between two checkpoints. None: once an epoch and at the end."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept; older ones are removed once a newer one is complete."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA where there is one."""
    compile: Annotated[Literal["auto", "off", "blocks"], _Off] = "auto"
    """``blocks``: compile each transformer block by torch.compile, once for each shape.
    ``auto``: on CUDA with ``mask.static_shapes``, but not under ZeRO 3. ``off``: nothing."""
    cuda_graphs: Annotated[Literal["off", "target"], _Off] = "off"
    """``target``: replay the target encoder's forward pass from a CUDA graph."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    progress: bool = True
    """Show progress (rank 0): a bar on a terminal, else a line every ``log_every`` steps."""


class EvalConfig(Section):
    every: PositiveInt | None = None
    """Steps between two evaluations. None: at the end only."""
    knn_k: PositiveInt = 20
    """Neighbours that vote."""
    knn_temperature: Annotated[float, Field(gt=0)] = 0.07
    """Votes weigh exp(cosine / temperature)."""
    max_train: PositiveInt = 10_000
    """Training images at most (a fixed subset beyond)."""
    max_test: PositiveInt = 5_000
    """Test images at most."""
    batch_size: PositiveInt = 256
    """Images per forward pass."""


class ImplConfig(Section):
    default: Literal["auto", "reference", "triton", "native"] = "auto"
    """Implementation of every fused op; what was chosen is printed at start."""


class Config(Section):
    """One run. Sections are documented where they are defined."""

    method: Method = "njepa"
    """ijepa, cjepa (+ VICReg), njepa (+ noise) or ncjepa (both); sets the defaults of
    ``noise.weight`` and ``vicreg.weight``, explicit values win."""
    recipe: str = "custom"
    """Name of the recipe that this configuration came from."""
    data: DataConfig = DataConfig()
    mask: MaskConfig = MaskConfig()
    model: ModelConfig = ModelConfig()
    noise: NoiseConfig = NoiseConfig()
    vicreg: VicregConfig = VicregConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    eval: EvalConfig = EvalConfig()
    impl: ImplConfig = ImplConfig()

    @model_validator(mode="before")
    @classmethod
    def _method_defaults(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        method = raw.get("method", "njepa")
        defaults = {
            "noise": {"weight": 1.0 if method in ("njepa", "ncjepa") else 0.0},
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
        if size % patch:
            below = size // patch * patch
            raise ValueError(
                f"data.image_size must be a multiple of model.patch_size={patch}, got {size}; "
                f"set data.image_size={below or patch} or {below + patch}"
            )
        if self.noise.weight > 0 and self.noise.map == "per_block":
            levels, blocks = self.noise.levels, self.mask.n_targets
            if levels > blocks:
                raise ValueError(
                    f"noise.map=per_block places at most mask.n_targets={blocks} levels on an "
                    f"image, got noise.levels={levels}; lower noise.levels, raise mask.n_targets, "
                    f"or set noise.map=per_token, per_sample or all"
                )
        if (
            self.vicreg.weight > 0
            and self.vicreg.on == "pred_blocks"
            and self.mask.n_targets < 2
            and not (self.noise.predictors == 1 and self.noise.map == "all")
        ):
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
        known = list(_fields_at(location[:-1]))
        home = [s for s in _fields_at([]) if key in _fields_at([s])]
        moved = f"; {key} lives in section {home[0]!r}" if home else ""
        return f"{where}: unknown key{did_you_mean(key, known) or moved}; known: {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return str(message)  # the validators above name their keys
    return f"{where}: {message[0].lower()}{message[1:]}, got {got!r}"


def _fields_at(location: list[str]) -> list[str]:
    model: Any = Config
    for part in location:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = field.annotation if field is not None else None
    return list(model.model_fields) if hasattr(model, "model_fields") else []


def did_you_mean(word: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
