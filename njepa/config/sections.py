"""Long: all sections in one table, each field with its meaning, its unit and its default.

The recipe owns everything except what the DeepSpeed file owns (batch size, accumulation, ZeRO,
precision, clipping).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Range = tuple[float, float]
#: Of tokens or layers: beyond it a mistake, whose memory nobody has.
Width = Annotated[int, Field(gt=0, le=2**16)]
Depth = Annotated[int, Field(gt=0, le=1000)]
PredictorContext = Literal["per_block", "shared"]
#: YAML reads a bare ``off`` as false.
_Off = BeforeValidator(lambda value: "off" if value is False else value)


def usable(path: Path) -> Path:
    """``path``, if a file can have that name."""
    try:
        if b"\0" not in os.fsencode(path):
            return path
    except UnicodeEncodeError:
        pass
    raise ValueError("a path holds no NUL and no half of a character")


FilePath = Annotated[Path, AfterValidator(usable)]

#: sigma_data of EDM (arXiv 2206.00364), N-JEPA's standard deviation of the noise (Algorithm 1).
SIGMA_DATA = 0.5

#: In a recipe: the user must give this value.
UNSET = "???"


@dataclass(frozen=True)
class OnResume:
    """Mark of a field or a section: whether a resumed run may have another value there.

    The innermost mark counts; without any, the value decides the result of the run and stays.
    """

    free: bool


FREE, FIXED = OnResume(True), OnResume(False)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _increasing(name: str, values: Range, low: float, high: float = math.inf) -> None:
    if not low < values[0] <= values[1] <= high:
        bound = f"{low:g} < low <= high" + (f" <= {high:g}" if high < math.inf else "")
        raise ValueError(f"{name} must be [low, high] with {bound}, got {list(values)}")


class DataConfig(Section):
    path: Annotated[FilePath | None, FREE] = None
    """Image folder, list file (.txt), tar shards or Parquet (a file, a folder or a pattern). null:
    the embedded set ``shapes``."""
    eval_path: Annotated[FilePath | None, FREE] = None
    """Labelled test images (class folders, or a list or shards with labels), for kNN and linear
    probe; ``path`` then needs labels too."""
    backend: Annotated[Literal["auto", "dali", "torch"], FREE] = "auto"
    """``auto``: DALI on a GPU where it is installed, torchvision otherwise."""
    image_size: Annotated[int, Field(gt=0, le=2**14)] = 224
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
    workers: Annotated[Annotated[int, Field(ge=0, le=1024)] | None, FREE] = None
    """Loader processes (torchvision) or threads (DALI) per rank. null: on a GPU the cores of this
    machine shared among its ranks, at most 16; on a CPU one. 0: decode in the training process
    (torchvision only)."""
    prefetch: Annotated[Annotated[int, Field(gt=0, le=1024)], FREE] = 2
    """Batches decoded ahead, per worker (torchvision) or in all (DALI)."""
    hw_decoder_load: Annotated[Fraction, FREE] = 0.65
    """Share of the JPEGs that DALI gives to the GPU's hardware decoder, where there is one (A100,
    H100, H200); the rest is decoded by its CUDA kernels. DALI's default."""
    reduced_decode: Annotated[bool, FREE] = False
    """Decode a JPEG at 1/4 or 1/8 of its size where its crop keeps twice the pixels a side that are
    needed: faster for large photographs, slightly other pixels (torchvision only; docs/data.md)."""
    on_error: Annotated[Literal["skip", "stop"], FREE] = "skip"
    """An image that cannot be read or decoded: ``skip`` takes the next one of the epoch's order in
    its place, names and counts it; ``stop`` ends the run before the step that needs it."""
    max_bad_frac: Annotated[Fraction, FREE] = 0.02
    """More unreadable images than this share of the source end the run: those that the index left
    out, and those that any rank has met since its start; looked at with every line of the log."""
    cache_dir: Annotated[FilePath | None, FREE] = None
    """Where the index of a source and the embedded set are kept. null: ``~/.cache/njepa``."""

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
        _increasing("data.crop_ratio", self.crop_ratio, low=1e-3, high=1e3)
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
    n_targets: Annotated[int, Field(gt=0, le=256)] = 4
    """Target blocks per image (M)."""
    min_keep: Annotated[int, Field(ge=0)] = 10
    """Every target block, and every context after removing the targets, has more patches than
    this."""
    allow_overlap: bool = False
    """Keep target patches in the context."""
    ragged: bool = False
    """Every image keeps all of its context patches, instead of as many as the image of the batch
    with the fewest. More tokens per step, and per image another number (docs/configuration.md)."""
    static_shapes: bool = False
    """Fix the number of context patches in advance for each pair of block sizes, at its mean, so
    that a run has few shapes; images with too short a context (about one image in two batches)
    are drawn again. For ``run.compile``. Not with ``ragged``."""

    @model_validator(mode="after")
    def _check(self) -> MaskConfig:
        _increasing("mask.context_scale", self.context_scale, low=0.0, high=1.0)
        _increasing("mask.target_scale", self.target_scale, low=0.0, high=1.0)
        _increasing("mask.aspect_ratio", self.aspect_ratio, low=1e-3, high=1e3)
        if self.ragged and self.static_shapes:
            raise ValueError(
                "mask.static_shapes gives every image the same number of context patches and "
                "mask.ragged gives each its own, got both true; set one of them to false"
            )
        return self


class PredictorConfig(Section):
    depth: Depth = 6
    """Transformer blocks."""
    width: Width = 384
    """Token width d; a multiple of 4 and of ``heads``."""
    heads: PositiveInt | None = None
    """Attention heads. null: as many as the encoder, as published."""
    context: PredictorContext = "per_block"
    """``per_block``: every target block has a context of its own, which attends to its queries too,
    as published. ``shared``: the context attends to itself only and is computed once per image for
    all blocks and levels; less work, another model (docs/variants.md)."""

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
    width: Width | None = None
    """Overrides the encoder's token width D."""
    depth: Depth | None = None
    """Overrides the encoder's number of blocks."""
    heads: PositiveInt | None = None
    """Overrides the encoder's number of attention heads."""
    attention: Annotated[Literal["auto", "sdpa", "xformers", "varlen"], FREE] = "auto"
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
    init_from: str | None = None
    """Weights to start from instead of random ones: a run, an official .pth.tar, a folder of timm
    or transformers (docs/weights.md). Its position table comes with it, whatever ``pos_scale``."""
    init_which: Literal["both", "target", "context"] = "both"
    """``both``: each encoder from its own, where ``init_from`` holds both; else both from one."""
    init_predictor: bool = True
    """Start from the predictor of ``init_from`` too, where it holds one."""
    checkpoint_blocks: Annotated[bool, FREE] = False
    """Keep only the input of each block of the context encoder and the predictors for the backward,
    and compute the rest again there: the same gradients, less memory, about a third more
    arithmetic."""
    fused_block: Annotated[bool, FREE] = False
    """Residual add with LayerNorm, and bias with GELU, as ops of njepa_kernels in all blocks: the
    same parameters and, up to rounding, values with fewer passes over memory
    (docs/performance.md)."""
    target_dtype: Annotated[Literal["auto", "bf16", "fp8"], FREE] = "auto"
    """What the layers of the target encoder multiply in. ``auto``: as all others. ``bf16``: so,
    too, and an error where the run computes in fp32. ``fp8``: the linear layers of its blocks in
    float8_e4m3fn, on a GPU of compute capability 8.9 or more (docs/variants.md); the target itself
    stays fp32, and so does what is saved and evaluated."""


def _read_sigma(value: Any) -> Any:
    """A number >= 0, "edm" or a list of numbers >= 0; one message for everything else."""
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if value == "edm" or (numbers and all(_is_sigma(x) for x in numbers)):
        return tuple(value) if isinstance(value, list) else value
    raise ValueError(
        f"noise.sigma must be a number >= 0, 'edm' or a list of numbers >= 0 (one or more, dealt "
        f"over the target blocks), got {value!r}"
    )


def _is_sigma(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


class NoiseConfig(Section):
    """N-JEPA's noise on the positions of masked tokens (arXiv 2507.15216; docs/method.md)."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    """λ1, the weight of the noised predictor's loss. ``method`` sets 0.1 for njepa and ncjepa.
    Without noise, that is with λ1 = λ2 = 0, nothing of this section is built."""
    consistency: Annotated[float, Field(ge=0)] = 0.0
    """λ2, the weight of the squared difference of both predictions. ``method`` sets 0.1 for njepa
    and ncjepa."""
    consistency_stop: Literal["none", "clean", "noised"] = "none"
    """Which prediction the consistency loss treats as a constant. ``none``, as published: the
    gradient goes into both."""
    sigma: Annotated[float | Literal["edm"] | tuple[float, ...], BeforeValidator(_read_sigma)] = (
        SIGMA_DATA
    )
    """Standard deviation of the noise, in the unit of the position table: a number; ``edm``: ln σ ~
    N(-1.2, 1.2²), one draw per image and block (per image where the noise is shared); or a list,
    dealt over the blocks of each image."""
    draw: Literal["per_block", "shared"] = "per_block"
    """``per_block``: every target block has noise of its own (the paper's multi-level). ``shared``:
    a patch has the same noise in all blocks of an image (single-level)."""
    predictors: Literal["unshared", "shared", "single"] = "unshared"
    """``unshared``, as published: the noised predictor has weights of its own. ``shared``: one
    predictor makes both predictions; ``method=ncjepa`` sets it. ``single``: one predictor, all of
    its queries noised, no clean loss."""
    mask_token: Literal["unshared", "shared"] = "unshared"
    """Whether clean and noised queries start from one mask token."""
    space: Literal["predictor", "encoder_tied"] = "predictor"
    """``encoder_tied``: the noise is drawn in the encoder's width and projected by the predictor's
    own context projection without its bias (StoP)."""

    @model_validator(mode="after")
    def _check(self) -> NoiseConfig:
        if self.predictors == "single" and self.consistency > 0:
            raise ValueError(
                f"noise.consistency={self.consistency:g} compares a clean and a noised prediction, "
                f"but noise.predictors=single makes the noised one only; set noise.consistency=0 "
                f"or noise.predictors=unshared"
            )
        if isinstance(self.sigma, tuple) and self.draw == "shared":
            raise ValueError(
                f"noise.draw=shared gives a patch the same noise in all blocks, but the list "
                f"noise.sigma={list(self.sigma)} gives the blocks different ones; set one number "
                f"or noise.draw=per_block"
            )
        return self

    @property
    def active(self) -> bool:
        """Whether there is a noised prediction at all."""
        return self.weight > 0 or self.consistency > 0


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
    """Standard deviation below which the hinge penalises."""
    eps: Annotated[float, Field(gt=0)] = 1e-4
    """Added to the variance inside the root."""
    on: Literal["pred_blocks", "context_vs_target"] = "pred_blocks"
    """The paper's two specifications. ``pred_blocks`` (Algorithm 1): the mean predictions of the
    target blocks of an image are its views. ``context_vs_target`` (pseudo-code C.2): the mean
    context token against the mean target token, variance and covariance of the context alone."""
    projector: tuple[Width, ...] | Literal["identity"] | None = None
    """Widths of the Linear-BN-ReLU projector (last one linear). null: (D, D, D)."""


class OptimConfig(Section):
    epochs: PositiveInt = 600
    """Length of the training and of all schedules, in passes over the data."""
    warmup_epochs: Annotated[float, Field(ge=0, le=2**31)] = 15
    """Linear warm-up of the learning rate, in epochs."""
    lr_start: Annotated[float, Field(ge=0)] = 1e-4
    """Learning rate at the start of the warm-up."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate after the warm-up; not scaled by the batch size."""
    lr_shape: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: ``cosine`` goes from ``lr`` to ``lr_final``; ``constant`` stays at ``lr``,
    and ``lr_final`` has no effect."""
    lr_final: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the end of the cosine; no effect with ``lr_shape: constant``."""
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
    fused_update: bool = False
    """AdamW, the target encoder's average and its bf16 copy as one op of njepa_kernels: the same
    mathematics in one pass over memory (docs/performance.md). ZeRO stage 0 without ``bf16``."""
    ema: tuple[Fraction, Fraction] = (0.996, 1.0)
    """Momentum of the target encoder at the first and the last step, linear in between."""
    schedule_scale: Annotated[float, Field(ge=1, le=1000)] = 1.0
    """Stretch of the cosine and EMA schedules beyond ``epochs`` (published ``ipe_scale``)."""


class RunConfig(Section):
    dir: FilePath | None = None
    """Run folder. null: ``runs/<recipe>``."""
    resume: bool = False
    """Continue the run in ``dir`` from its last checkpoint."""
    seed: Annotated[int, Field(ge=0, lt=2**32), FIXED] = 0
    """The one seed behind weights, order, crops, masks, levels and noise."""
    max_steps: Annotated[PositiveInt | None, FIXED] = None
    """Length of the training and of all schedules in steps; overrides ``optim.epochs``."""
    stop_after: PositiveInt | None = None
    """Write a checkpoint and stop after this global step, as if interrupted (schedules keep their
    full length)."""
    grace_s: Annotated[float, Field(gt=0)] = 25.0
    """Seconds that a checkpoint and the end of the run may take after the first SIGTERM, SIGUSR1 or
    Ctrl-C (docs/running.md, Stop and resume). Slurm, Kubernetes and launchers kill after 30."""
    log_every: PositiveInt = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: PositiveInt | None = None
    """Steps between two checkpoints. null: once an epoch and at the end."""
    max_bad_steps: PositiveInt = 10
    """Steps in a row whose loss or gradient is not finite, at which the run goes back to a
    checkpoint (``max_rollbacks``) or ends. Such a step changes nothing; a log line counts them
    (``bad_steps``)."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 1
    """How often a run with too many bad steps in a row goes back to the last checkpoint before
    them and on from there with another order of the data, other crops, masks and noise."""
    on_collapse: Annotated[Literal["warn", "stop", "off"], _Off] = "warn"
    """Where every image gets the same features (docs/trouble.md, Collapse): ``warn`` says so once
    and keeps a checkpoint, ``stop`` ends the run, too, with status 1. ``off``: nothing."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept; older ones are removed once a newer one is complete."""
    keep_every: PositiveInt | None = None
    """Checkpoints of multiples of so many steps stay for ever. null: no others than the newest."""
    timeout_s: Annotated[float, Field(ge=1, le=86400)] = 1800.0
    """Seconds after which the run ends, with several ranks: one of them is silent, or none moves
    (docs/running.md, Several ranks). More than the longest single read, write or compilation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA where there is one."""
    compile: Annotated[Literal["auto", "off", "blocks"], _Off] = "auto"
    """``blocks``: compile each transformer block by torch.compile, once for each shape.
    ``auto``: on CUDA with ``mask.static_shapes``, but not under ZeRO 3. ``off``: nothing."""
    cuda_graphs: Annotated[Literal["off", "target", "step"], _Off] = "off"
    """``target``: replay the target encoder's forward pass from a CUDA graph. ``step``: replay
    whole steps, one graph for each shape, by torch's own engine in the place of DeepSpeed's: one
    rank, ZeRO 0, no accumulation, ``mask.static_shapes`` and ``optim.fused_update``."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    tracker: Literal["none", "wandb", "mlflow", "trackio"] = "none"
    """Send the numbers to this library, too, where it is installed (docs/running.md, Trackers)."""
    progress: bool = True
    """Show progress (rank 0): a bar on a terminal, else a line every ``log_every`` steps."""


class EvalConfig(Section):
    which: Literal["target", "context", "both"] = "target"
    """Encoder that kNN and linear probe look at. I-JEPA reports the target encoder, N-JEPA the
    context encoder (its student). ``both``: keys of the context encoder end in ``_context``."""
    every: PositiveInt | None = None
    """Steps between two evaluations. null: at the end only."""
    knn_k: PositiveInt = 20
    """Neighbours that vote."""
    knn_temperature: Annotated[float, Field(gt=0)] = 0.07
    """Votes weigh exp(cosine / temperature)."""
    max_train: PositiveInt = 10_000
    """At most this many training images; a larger source gives a fixed subset."""
    max_test: PositiveInt = 5_000
    """At most this many test images; a larger source gives a fixed subset."""
    batch_size: PositiveInt = 256
    """Images per forward pass."""
    online: bool = False
    """Follow the training with a linear head and kNN on the target features of its steps
    (docs/evaluation.md); ``data.path`` then needs labels. Changes nothing of the run."""
    report: bool = True
    """Draw ``report.html`` into the run folder at the end (docs/report.md); takes seconds."""


class ImplConfig(Section):
    default: Literal["auto", "reference", "triton", "native"] = "auto"
    """Implementation of every fused op; what was chosen is printed at start."""
