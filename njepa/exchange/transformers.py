"""A folder that transformers loads: ``IJepaModel.from_pretrained(FOLDER)``, versions 4 and 5."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from njepa.exchange.layouts import to_transformers
from njepa.exchange.weights import EncoderWeights, Weights

LIBRARY = "transformers"


def write(folder: Path, encoder: EncoderWeights, weights: Weights) -> str:
    """model.safetensors, config.json, preprocessor_config.json; returns what they hold."""
    save_file(
        to_transformers(encoder.state), folder / "model.safetensors", metadata={"format": "pt"}
    )
    config = {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,  # its own default is 1e-12
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "torch_dtype": "float32",
        "njepa": {"which": encoder.which},
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": encoder.image_size, "width": encoder.image_size},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),  # its own defaults are .5
        "image_std": list(encoder.std),
    }
    for name, content in (("config", config), ("preprocessor_config", processor)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return (
        f"model.safetensors holds one encoder ({encoder.which}) under the names of transformers 4, "
        f"which version 5 reads too. ViTImageProcessor resizes an image to a square without "
        f"cropping it; crop before, if that matters."
    )


def usage(encoder: EncoderWeights) -> str:
    return """
import torch
from transformers import AutoImageProcessor, IJepaModel
processor = AutoImageProcessor.from_pretrained("FOLDER")
model = IJepaModel.from_pretrained("FOLDER").eval()
with torch.no_grad():
    tokens = model(**processor(image, return_tensors="pt")).last_hidden_state
features = tokens.mean(1)    # [1, D]
"""


def library_features(folder: Path, encoder: EncoderWeights, pixels: Tensor) -> tuple[str, Tensor]:
    """(version, [B, N, D]) of normalised images, by transformers itself.

    Raises:
        RuntimeError: it did not find every key, or found others.
    """
    import transformers

    model, info = transformers.IJepaModel.from_pretrained(
        str(folder), local_files_only=True, output_loading_info=True
    )
    wrong = {key: sorted(names) for key, names in info.items() if names}
    if wrong:
        raise RuntimeError(f"transformers {transformers.__version__} reports {wrong}")
    features: Tensor = model.eval()(pixels).last_hidden_state
    return f"transformers {transformers.__version__}", features
