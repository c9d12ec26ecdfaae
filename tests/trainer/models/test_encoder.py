"""The encoder: timm's network on a subset of tokens, its positions and its initial weights."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from bench.published import networks
from njepa.config import ConfigError, ModelConfig
from njepa.models.architecture import Stack, encoder_stack
from njepa.models.encoder import Encoder, build_encoder
from njepa.models.positions import position_table, sincos
from tests.support.tiny import make_batch, normalised, tiny_config


def timm_twin() -> VisionTransformer:
    return VisionTransformer(
        img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=2, class_token=False,
        global_pool="avg", fc_norm=False, num_classes=0,
    )  # fmt: skip


def test_state_dict_is_timms_both_ways():
    """Features of bytes are timm's of the normalised image, in fp64."""
    encoder, twin = build_encoder(tiny_config()).double(), timm_twin().double()
    images = make_batch(tiny_config()).images
    floats, exact = normalised(images, tiny_config(), torch.float64), {"rtol": 1e-12, "atol": 1e-12}
    twin.load_state_dict(encoder.state_dict(), strict=True)
    torch.testing.assert_close(encoder(images), twin.forward_features(floats), **exact)
    other = timm_twin().double()  # with weights and a position table of its own
    encoder.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(encoder(images), other.forward_features(floats), **exact)
    torch.testing.assert_close(encoder(images).mean(1), other(floats), **exact)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("vit_tiny", "vit_tiny_patch16_224"), ("vit_small", "vit_small_patch16_224"),
        ("vit_base", "vit_base_patch16_224"), ("vit_large", "vit_large_patch16_224"),
        ("vit_huge", "vit_huge_patch14_gap_224"), ("vit_giant", "vit_giant_patch16_gap_224"),
    ],
)  # fmt: skip
def test_named_sizes_have_timms_shapes(ours: str, theirs: str):
    patch = 14 if "patch14" in theirs else 16
    with torch.device("meta"):
        twin = timm.create_model(theirs, num_classes=0, class_token=False, global_pool="avg",
                                 fc_norm=False)  # fmt: skip
        encoder = Encoder(encoder_stack(ModelConfig(encoder=ours)), 224, patch)
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in twin.state_dict().items()}
    assert encoder.blocks[0].attn.num_heads == twin.blocks[0].attn.num_heads


def test_subset_is_taken_after_positions_and_before_blocks():
    encoder, batch = build_encoder(tiny_config()).double(), make_batch(tiny_config())
    twin, exact = timm_twin().double(), {"rtol": 1e-12, "atol": 1e-12}
    twin.load_state_dict(encoder.state_dict())
    got = encoder(batch.images, batch.masks.context_idx)
    tokens = twin.patch_embed(normalised(batch.images, tiny_config(), torch.float64))
    tokens = tokens + twin.pos_embed
    for b in range(len(tokens)):
        kept = tokens[b, batch.masks.context_idx[b]].unsqueeze(0)
        torch.testing.assert_close(got[b], twin.norm(twin.blocks(kept))[0], **exact)
    everything = torch.arange(36).expand(4, -1)
    torch.testing.assert_close(encoder(batch.images, everything), encoder(batch.images), **exact)


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5, 0.1, 0.9), (1.0, 0.3, 0.6))],
)
def test_bytes_are_the_normalised_image(mean: tuple[float, ...], std: tuple[float, ...]):
    """Features, and the gradients of all weights, against timm's network."""
    config = tiny_config(data={"mean": mean, "std": std})
    batch, weights = make_batch(config), torch.randn(4, 36, 32)
    encoder, twin = build_encoder(config), timm_twin()
    twin.load_state_dict(encoder.state_dict())
    twin.pos_embed.requires_grad_(False)
    outputs = encoder(batch.images), twin.forward_features(normalised(batch.images, config))
    values = []
    for network, features in zip((encoder, twin), outputs, strict=True):
        (features * weights).sum().backward()
        grads = {n: p.grad for n, p in network.named_parameters() if p.requires_grad}
        values.append({"features": features.detach(), **grads})
    assert values[0].keys() == values[1].keys()
    for name, value in values[0].items():
        scale = values[1][name].abs().max()
        assert (value - values[1][name]).abs().max() <= 3e-6 * scale, name


def test_bytes_under_autocast_are_the_convolution_under_autocast():
    """The patches are rounded where they are made, not once more: the same bf16 inputs."""
    config = tiny_config()
    encoder, batch, twin = build_encoder(config), make_batch(config), timm_twin()
    twin.load_state_dict(encoder.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        got = encoder(batch.images)
        expected = twin.forward_features(normalised(batch.images, config))
    assert got.dtype == expected.dtype
    assert (got - expected).abs().mean() < 2e-3 * expected.abs().mean()


@pytest.mark.parametrize("autocast", [False, True])
def test_bytes_compile_as_one_graph(autocast: bool):
    torch.compiler.reset()
    encoder, batch = build_encoder(tiny_config()), make_batch(tiny_config())
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for idx in (batch.masks.context_idx, None):
            expected = encoder(batch.images, idx)
            torch.testing.assert_close(compiled(batch.images, idx), expected)


def test_patches_outside_the_subset_have_no_influence():
    encoder, batch = build_encoder(tiny_config()), make_batch(tiny_config())
    kept = torch.zeros(4, 36, dtype=torch.bool).scatter(1, batch.masks.context_idx, True)
    before = encoder(batch.images, batch.masks.context_idx)
    for b in range(4):
        for patch in range(36):
            images = batch.images.clone()
            top, left = 8 * (patch // 6), 8 * (patch % 6)
            images[b, top : top + 8, left : left + 8] = 0
            changed = (encoder(images, batch.masks.context_idx) != before).flatten(1).any(1)
            assert changed[b] == kept[b, patch]
            assert changed.sum() == changed[b]


def test_position_table():
    table = position_table(32, (6, 6))
    torch.testing.assert_close(table, networks.sincos(6, 32)[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(table.square().mean(1).sqrt(), torch.full((36,), math.sqrt(0.5)))
    wide = position_table(16, (2, 3), scale=0.5)  # 2 rows, 3 columns
    assert torch.equal(wide[0, :8], wide[3, :8])  # same column, next row
    assert torch.equal(wide[0, 8:], wide[1, 8:])  # same row, next column
    torch.testing.assert_close(2 * wide[2], torch.cat(
        (sincos(torch.tensor(2.0), 8), sincos(torch.tensor(0.0), 8))))  # fmt: skip
    for function in (lambda: position_table(30, (2, 2)), lambda: sincos(torch.zeros(1), 3)):
        with pytest.raises(ValueError, match=r"got (30|3)"):
            function()


def test_positions_are_frozen_and_scaled():
    encoder = build_encoder(tiny_config(model={"pos_scale": 0.5}))
    assert not encoder.pos_embed.requires_grad
    torch.testing.assert_close(encoder.pos_embed[0], 0.5 * networks.sincos(6, 32)[0])


def test_published_init():
    config = tiny_config(model={"width": 128, "depth": 2, "heads": 4})
    encoder = build_encoder(config)
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            assert torch.count_nonzero(parameter) == 0, name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name != "pos_embed":
            spread = 0.02 * 4 / math.sqrt(2 * parameter.numel())  # four standard errors
            assert abs(parameter.std().item() - 0.02) < spread, name
    rescaled = build_encoder(config.model_copy(update={
        "model": config.model.model_copy(update={"depth_rescaled_init": True})}))  # fmt: skip
    for depth in (1, 2):
        for part in ("attn.proj", "mlp.fc2"):
            name = f"blocks.{depth - 1}.{part}.weight"
            expected = encoder.get_parameter(name) / math.sqrt(2 * depth)
            torch.testing.assert_close(rescaled.get_parameter(name), expected)
    assert torch.equal(rescaled.blocks[0].mlp.fc1.weight, encoder.blocks[0].mlp.fc1.weight)


def test_xavier_init():
    model = {"width": 128, "heads": 4, "init": "xavier", "init_gain": 1.4}
    encoder = build_encoder(tiny_config(model=model))
    for weight in (encoder.blocks[0].attn.qkv.weight, encoder.patch_embed.proj.weight):
        fan_out, fan_in = weight.flatten(1).shape
        bound = 1.4 * math.sqrt(6 / (fan_in + fan_out))
        assert weight.abs().max() <= bound
        assert abs(weight.std().item() / (bound / math.sqrt(3)) - 1) < 0.02
    assert torch.count_nonzero(encoder.blocks[0].attn.qkv.bias) == 0


def test_seed_decides_the_weights_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_encoder(tiny_config())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = build_encoder(tiny_config())
    other = build_encoder(tiny_config(run={"seed": 1}))
    name = "blocks.1.mlp.fc1.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_autocast_keeps_the_residual_stream_in_fp32():
    encoder, batch = build_encoder(tiny_config()), make_batch(tiny_config())
    seen: list[torch.dtype] = []
    encoder.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        encoder(batch.images)
        encoder(batch.images, batch.masks.context_idx)
    assert seen == [torch.float32, torch.float32]


def test_pure_bf16_parameters():
    encoder, batch = build_encoder(tiny_config()).bfloat16(), make_batch(tiny_config())
    features = encoder(batch.images, batch.masks.context_idx)
    assert features.dtype == torch.bfloat16
    assert features.isfinite().all()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"encoder": "vit_bse"}, "did you mean 'vit_base'"),
        ({"width": 30}, "multiple of 4.*got 30"),
        ({"width": 64, "heads": 3}, r"model.width=64.*model.heads=3"),
    ],
)
def test_bad_sizes(model: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        encoder_stack(tiny_config(model=model).model)


def test_overrides():
    config = tiny_config(model={"encoder": "vit_giant", "width": 1056, "depth": 3, "heads": 12})
    assert encoder_stack(config.model) == Stack(1056, 3, 12, 4608)
