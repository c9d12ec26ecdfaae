"""Names of the same tensors in other libraries, and the check that none is missing.

Ours are timm's for the encoder and the published ones for the predictor. Other layouts: the prefix
``module.`` of published files (facebookresearch/ijepa, src/train.py saves DDP modules), and
transformers' ``IJepaModel``, whose file names of version 4 are also what version 5 writes, while
its modules have newer ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from njepa.config import ConfigError
from njepa.models.architecture import Stack
from njepa.models.encoder import Encoder
from njepa.models.predictor import Predictor

State = dict[str, Tensor]

#: From transformers' names, of both styles, to ours.
_TRANSFORMERS = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^ijepa\.", ""),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
        (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
        (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"^layernorm\.", "norm."),
    )
]
#: From ours to those that versions 4 and 5 read.
_TO_TRANSFORMERS = [
    (re.compile(pattern), theirs)
    for pattern, theirs in (
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^norm\.", "layernorm."),
    )
]


def to_ours(state: Mapping[str, Tensor]) -> State:
    """The same tensors under our names; names of no known layout stay as they are."""
    found = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if not any(name.startswith(("embeddings.", "ijepa.")) for name in found):
        return found
    renamed = {_rename(name, _TRANSFORMERS): tensor for name, tensor in found.items()}
    for name in [n for n in renamed if ".attn.q." in n]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):  # else the check names what is missing
            stacked = torch.cat([renamed.pop(part) for part in parts])
            renamed[name.replace(".attn.q.", ".attn.qkv.")] = stacked
    return renamed


def to_transformers(state: Mapping[str, Tensor]) -> State:
    """An encoder's tensors under the file names of transformers 4, which version 5 maps."""
    found: State = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                block, kind = name.split(".")[1], name.split(".")[-1]
                found[f"encoder.layer.{block}.attention.attention.{part}.{kind}"] = rows
        else:
            found[_rename(name, _TO_TRANSFORMERS)] = tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}


def to_published(state: Mapping[str, Tensor]) -> State:
    """With the prefix that published files have and published code expects."""
    return {f"module.{name}": tensor.contiguous() for name, tensor in state.items()}


def encoder_facts(state: Mapping[str, Tensor], origin: str) -> tuple[int, int, int, int, int]:
    """(width, depth, hidden, patch size, patches a side) of an encoder, from its tensors' shapes.

    Raises:
        ConfigError: no encoder of this family: not those tensors, or not those shapes.
    """
    patch, pos = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    fc1 = state.get("blocks.0.mlp.fc1.weight")
    if patch is None or pos is None or fc1 is None or patch.dim() != 4 or pos.dim() != 3:
        raise ConfigError(
            f"{origin}: no encoder of this family: expected patch_embed.proj.weight [D, 3, P, P],"
            f" pos_embed [1, N, D] and blocks.0.mlp.fc1.weight [4 D, D] (or their names in "
            f"transformers' IJepaModel), got {_some(state)}; other networks cannot be read"
        )
    side = round(pos.shape[1] ** 0.5)
    if side * side != pos.shape[1]:
        raise ConfigError(
            f"{origin}: pos_embed must have a square number of patches, got {pos.shape[1]}; "
            f"a class token or registers have no place in this family"
        )
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return patch.shape[0], depth, fc1.shape[0], patch.shape[2], side


def check_encoder(
    state: Mapping[str, Tensor], size: Stack, patch_size: int, side: int, origin: str
) -> None:
    """Every tensor is there and has its shape, and there is none besides.

    Raises:
        ConfigError: names every missing and unexpected key and every wrong shape.
    """
    with torch.device("meta"):
        _check(state, Encoder(size, side * patch_size, patch_size).state_dict(), origin)


def check_predictor(
    state: Mapping[str, Tensor], encoder_width: int, size: Stack, side: int, origin: str
) -> None:
    """The same for a predictor; a mask token of its own for noised queries may be there."""
    own_token = "noise_mask_token" in state
    with torch.device("meta"):
        built = Predictor(encoder_width, (side, side), size, noise_mask_token=own_token)
        _check(state, built.state_dict(), origin)


def predictor_facts(state: Mapping[str, Tensor], origin: str) -> tuple[int, int, int, int]:
    """(width, depth, hidden, patches a side) of a predictor, from its tensors' shapes."""
    embed, fc1 = (
        state.get("predictor_embed.weight"),
        state.get("predictor_blocks.0.mlp.fc1.weight"),
    )
    pos = state.get("predictor_pos_embed")
    if embed is None or fc1 is None or pos is None or pos.dim() != 3:
        raise ConfigError(
            f"{origin} is no predictor of this family: expected predictor_embed.weight [d, D], "
            f"predictor_pos_embed [1, N, d] and predictor_blocks.0.mlp.fc1.weight, got "
            f"{_some(state)}; model.init_predictor=false begins with a new one"
        )
    depth = len({n.split(".")[1] for n in state if n.startswith("predictor_blocks.")})
    return embed.shape[0], depth, fc1.shape[0], round(pos.shape[1] ** 0.5)


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    problems = [f"missing: {name}" for name in expected if name not in state]
    problems += [f"unexpected: {name}" for name in state if name not in expected]
    problems += [
        f"{name}: got {list(state[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(
            f"{origin} does not fit, {len(problems)} of its keys differ:\n{listed}\n"
            f"only a plain ViT without class token, registers, layer scale and head can be read; "
            f"remove what is not part of the encoder, or use a file of this family"
        )


def _rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def _some(state: Mapping[str, object]) -> str:
    names = sorted(state)
    return f"{len(names)} keys: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
