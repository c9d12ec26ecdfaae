"""A folder that timm loads: ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from njepa.exchange.weights import EncoderWeights, Weights

LIBRARY = "timm"
#: Of timm's I-JEPA architectures; ``model_args`` in the file give every size that it fixes.
_ARCHITECTURE = "vit_huge_patch14_gap_224"
_NAMED = {
    (1280, 32, 16, 448): "vit_huge_patch16_gap_448",
    (1408, 40, 16, 224): "vit_giant_patch16_gap_224",
}


def write(folder: Path, encoder: EncoderWeights, weights: Weights) -> str:
    """model.safetensors and config.json; returns what they hold."""
    save_file(
        {name: tensor.contiguous() for name, tensor in encoder.state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    key = encoder.width, encoder.depth, encoder.patch_size, encoder.image_size
    size = encoder.image_size
    config = {
        "architecture": _NAMED.get(key, _ARCHITECTURE),
        "num_classes": 0,
        "num_features": encoder.width,
        "global_pool": "avg",
        "model_args": model_args(encoder),
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "njepa": {"which": encoder.which},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return (
        f"model.safetensors holds one encoder ({encoder.which}) under timm's names. The name of "
        f"the architecture in config.json only selects the class; model_args give every size."
    )


def model_args(encoder: EncoderWeights) -> dict[str, Any]:
    """Of timm's VisionTransformer, so that nothing depends on the architecture's name."""
    return {
        "img_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "embed_dim": encoder.width,
        "depth": encoder.depth,
        "num_heads": encoder.heads,
        "mlp_ratio": mlp_ratio(encoder),
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    }


def mlp_ratio(encoder: EncoderWeights) -> float:
    """A ratio r for which int(width r), which timm computes, is the MLP's width."""
    ratio = encoder.hidden / encoder.width
    return ratio if int(encoder.width * ratio) == encoder.hidden else ratio + 0.5 / encoder.width


def usage(encoder: EncoderWeights) -> str:
    return """
import timm, torch
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    features = model(transform(image).unsqueeze(0))    # [1, D], the mean over patches
"""


def library_features(folder: Path, encoder: EncoderWeights, pixels: Tensor) -> tuple[str, Tensor]:
    """(version, [B, N, D]) of normalised images, by timm itself."""
    import timm

    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    features: Tensor = model.forward_features(pixels)
    return f"timm {timm.__version__}", features
