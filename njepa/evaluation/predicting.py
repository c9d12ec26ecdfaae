"""A whole JEPA to look at: context encoder, predictors and target encoder of a source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from njepa.config import Config, ConfigError, parse_config
from njepa.config.reading import read_yaml
from njepa.config.sections import ImplConfig, VicregConfig
from njepa.exchange.layouts import State, check_predictor, predictor_facts
from njepa.exchange.reading import open_weights
from njepa.exchange.weights import EncoderWeights, Weights
from njepa.models.architecture import SIZES, Stack
from njepa.models.encoder import Encoder
from njepa.models.jepa import Jepa, build_jepa


@dataclass(frozen=True)
class Predicting:
    """In eval mode, fp32, on the CPU."""

    config: Config
    """Of the run; for a file without one, that of published I-JEPA in the file's sizes."""
    jepa: Jepa
    target: Encoder
    assumed: str
    """What the source does not say and was assumed, for people; empty for runs."""

    def untrained(self) -> Predicting:
        """The same network before any training, its target encoder included."""
        jepa = build_jepa(_plain(self.config)).eval()
        return dataclasses.replace(self, jepa=jepa, target=jepa.encoder)


def open_predicting(source: str) -> Predicting:
    """The network of a run, of a checkpoint, or of an official I-JEPA file with its predictor.

    Raises:
        ConfigError: there is no predictor or but one encoder, or they do not fit together.
    """
    weights = open_weights(source)
    if missing := {"target", "context"} - set(weights.encoders):
        held = "only an encoder" if "only" in weights.encoders else f"no {missing.pop()} encoder"
        raise ConfigError(_refusal(weights, held))
    predictors = dict(weights.predictors())
    if "predictor" not in predictors:
        raise ConfigError(_refusal(weights, "no predictor"))
    target, told = weights.encoder("target"), weights.record.get("config")
    if told is not None:
        config, assumed = parse_config(read_yaml(told, weights.origin), weights.origin), ""
    else:
        own = {k: v for k, v in predictors["predictor"].items() if k != "noise_mask_token"}
        predictors = {"predictor": own}
        config = _published(weights, target, own)
        assumed = "it names no masks and no noise: published masks, clean predictions"
    jepa = load_jepa(config, weights, predictors)
    return Predicting(config, jepa, target.build(), assumed)


def load_jepa(config: Config, weights: Weights, predictors: Mapping[str, State]) -> Jepa:
    """Context encoder and predictors, without a projector, in eval mode.

    Raises:
        ConfigError: the context encoder cannot be read, or weights do not fit ``config``.
    """
    jepa, context = build_jepa(_plain(config)), weights.encoder("context")
    try:
        jepa.encoder.load_state_dict(context.state)
        for name, state in predictors.items():
            getattr(jepa, name).load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            f"{weights.origin}: its weights do not fit its settings: {text}; both must be "
            f"of one run"
        ) from None
    return jepa.eval().requires_grad_(False)


def _plain(config: Config) -> Config:
    """Without what only a training needs."""
    return config.model_copy(update={"vicreg": VicregConfig(), "impl": ImplConfig()})


def _refusal(weights: Weights, held: str) -> str:
    return (
        f"--kind decode shows what a predictor expects, so it needs a predictor with its context "
        f"and target encoders, got {weights.origin} with {held}; give a run folder, a checkpoint, "
        f"or an official .pth.tar that has the keys encoder, target_encoder and predictor"
    )


def _published(weights: Weights, encoder: EncoderWeights, predictor: State) -> Config:
    """I-JEPA's defaults in the sizes that these tensors have."""
    origin = f"{weights.origin}, predictor"
    width, depth, hidden, side = predictor_facts(predictor, origin)
    heads = weights.predictor_heads or encoder.heads
    check_predictor(predictor, encoder.width, Stack(width, depth, heads, hidden), side, origin)
    sizes = {(size.width, size.depth): name for name, size in SIZES.items()}
    patches = (encoder.image_size // encoder.patch_size) ** 2
    raw = {
        "method": "ijepa",
        "data": {"image_size": encoder.image_size, "mean": encoder.mean, "std": encoder.std},
        # Published for 14 x 14 patches; a coarser grid has smaller blocks.
        "mask": {"min_keep": min(10, patches // 19)},
        "model": {
            "encoder": sizes.get((encoder.width, encoder.depth), "vit_tiny"),
            "patch_size": encoder.patch_size,
            "width": encoder.width,
            "depth": encoder.depth,
            "heads": encoder.heads,
            "predictor": {
                "width": width,
                "depth": depth,
                "heads": heads,
                "context": weights.predictor_context or "per_block",
            },
        },
    }
    return parse_config(raw, weights.origin)
