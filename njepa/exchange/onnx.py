"""The encoder as an ONNX graph, for any number of images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from njepa.config import ConfigError
from njepa.exchange.weights import EncoderWeights, Weights
from njepa.models.encoder import Encoder

LIBRARY = "onnx"
FILE = "model.onnx"
#: A protobuf message ends at 2 GB; larger weights go to a file beside it.
_LARGEST = 1_900_000_000


class PlainEncoder(nn.Module):
    """An encoder on normalised images, in torch's own operators.

    Args of ``forward``: float [B, 3, S, S]. Returns [B, N, D] after the final norm, and its mean
    over the patches, [B, D].
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        projection: Any = self.encoder.patch_embed["proj"]
        patches = F.conv2d(
            pixel_values, projection.weight, projection.bias, stride=projection.patch_size
        )
        x = patches.flatten(2).transpose(1, 2) + self.encoder.pos_embed
        block: Any
        for block in self.encoder.blocks:
            attention = block.attn
            qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + attention.proj(mixed)
            x = x + block.mlp(block.norm2(x))
        tokens = self.encoder.norm(x)
        return tokens, tokens.mean(1)


def write(folder: Path, encoder: EncoderWeights, weights: Weights) -> str:
    """model.onnx; returns what it holds.

    Raises:
        ConfigError: onnx or onnxscript are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--format onnx needs the packages onnx and onnxscript, and {error.name} is not "
            f'installed; pip install -e ".[export]"'
        ) from None
    model = PlainEncoder(encoder.build("reference")).eval()
    example = torch.zeros(2, 3, encoder.image_size, encoder.image_size)
    size = 4 * sum(tensor.numel() for tensor in encoder.state.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(
        model,
        (example,),
        folder / FILE,
        dynamo=True,
        verbose=False,
        external_data=size > _LARGEST,
        input_names=["pixel_values"],
        output_names=["last_hidden_state", "pooled"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
    )
    return (
        f"{FILE} holds one encoder ({encoder.which}): `pixel_values`, float32 [batch, 3, "
        f"{encoder.image_size}, {encoder.image_size}], normalised as below, to "
        f"`last_hidden_state` [batch, N, D] and `pooled` [batch, D], its mean over the patches."
    )


def usage(encoder: EncoderWeights) -> str:
    return f"""
import onnxruntime
session = onnxruntime.InferenceSession("FOLDER/{FILE}")
tokens, features = session.run(None, {{"pixel_values": images}})    # images: float32 numpy array
"""


def library_features(folder: Path, encoder: EncoderWeights, pixels: Tensor) -> tuple[str, Tensor]:
    """(version, [B, N, D]) of normalised images, by onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    tokens, _ = session.run(None, {"pixel_values": pixels.numpy()})
    return f"onnxruntime {onnxruntime.__version__}", torch.from_numpy(tokens)
