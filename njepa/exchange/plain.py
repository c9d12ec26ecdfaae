"""One encoder as safetensors under our names, with a JSON file that says what it is."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from njepa import __version__
from njepa.exchange.timm import model_args
from njepa.exchange.weights import FACTS, EncoderWeights, Weights, Which

LIBRARY = "timm"


def write(folder: Path, encoder: EncoderWeights, weights: Weights) -> str:
    """model.safetensors and encoder.json; returns what they hold."""
    facts = {
        "which": encoder.which,
        "width": encoder.width,
        "depth": encoder.depth,
        "heads": encoder.heads,
        "hidden": encoder.hidden,
        "patch_size": encoder.patch_size,
        "image_size": encoder.image_size,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in encoder.state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt", "which": encoder.which, "heads": str(encoder.heads)},
    )
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    return (
        f"model.safetensors holds one encoder ({encoder.which}) under the names of timm's "
        f"VisionTransformer; {FACTS} says its size and what its images were normalised with."
    )


def usage(encoder: EncoderWeights) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in model_args(encoder).items())
    return f"""
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
model = VisionTransformer({arguments}, num_classes=0)
model.load_state_dict(load_file("FOLDER/model.safetensors"))
features = model.eval()(images)    # [n, D], the mean over patches
# or with njepa: njepa.exchange.reading.read_encoder("FOLDER").build()
"""


def library_features(folder: Path, encoder: EncoderWeights, pixels: Tensor) -> tuple[str, Tensor]:
    """(what did it, [B, N, D]) of normalised images, by reading the folder back."""
    from njepa.exchange.onnx import PlainEncoder
    from njepa.exchange.reading import read_encoder

    which: Which = "context" if encoder.which == "context" else "target"
    read = read_encoder(folder, which).build("reference")
    return f"njepa {__version__}, read back", PlainEncoder(read)(pixels)[0]
