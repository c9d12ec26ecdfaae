"""The layout of official files: ``{encoder, target_encoder, predictor}`` with ``module.`` names.

facebookresearch/ijepa, src/train.py. What that code also keeps (opt, scaler) is left out: this is
for loading networks, not for resuming. timm and transformers' converter read the key ``encoder``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from njepa.exchange.layouts import State, to_ours, to_published
from njepa.exchange.timm import model_args
from njepa.exchange.weights import EncoderWeights, Weights, Which

LIBRARY = "timm"
FILE = "ijepa.pth.tar"


def write(folder: Path, encoder: EncoderWeights, weights: Weights) -> str:
    """One file with both encoders and the predictors, ``encoder`` under that key; says so."""
    states: dict[str, State] = {"encoder": encoder.state}
    names: tuple[Which, ...] = ("target", "context")
    for which in names:
        if which in weights.encoders and which != encoder.which:
            states["target_encoder" if which == "target" else "context_encoder"] = weights.encoder(
                which
            ).state
    states.setdefault("target_encoder", encoder.state)
    predictors = weights.predictors()
    states |= {name: to_ours(state) for name, state in predictors.items()}
    content: dict[str, Any] = {name: to_published(state) for name, state in states.items()}
    content["epoch"] = 0
    content["njepa"] = {
        "encoder": encoder.which,
        "heads": encoder.heads,
        "predictor_heads": weights.predictor_heads or encoder.heads,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "step": weights.record.get("step", 0),
    }
    if weights.predictor_context is not None:
        content["njepa"]["predictor_context"] = weights.predictor_context
    torch.save(content, folder / FILE)
    told = (
        f"{FILE} has the layout of official I-JEPA files. Its key `encoder`, the one that timm and "
        f"transformers' converter read, holds the {encoder.which} encoder. All keys: "
        f"{', '.join(f'`{name}`' for name in states)}. Optimizer state is not in it."
    )
    if predictors and weights.predictor_context == "shared":
        told += (
            " The predictor was trained with `model.predictor.context=shared`: it has the tensors "
            "of the published predictor and is another model, so the published code predicts "
            "something else with it. njepa reads this from the file."
        )
    return told


def usage(encoder: EncoderWeights) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in model_args(encoder).items())
    return f"""
import timm
model = timm.create_model(
    "vit_huge_patch14_gap_224",    # selects the class; the arguments give every size
    pretrained=True, pretrained_cfg_overlay=dict(file="FOLDER/{FILE}"), num_classes=0,
    {arguments},
)
"""


def library_features(folder: Path, encoder: EncoderWeights, pixels: Tensor) -> tuple[str, Tensor]:
    """(version, [B, N, D]) of normalised images, by timm from the file as it is."""
    import timm

    model: Any = timm.create_model(
        "vit_huge_patch14_gap_224",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(folder / FILE)},
        num_classes=0,
        **model_args(encoder),
    )
    features: Tensor = model.eval().forward_features(pixels)
    return f"timm {timm.__version__}", features
