"""Ragged masks: a batch is what its images are one by one, however their tokens are laid out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from njepa.config import Config, MaskConfig, load_config
from njepa.data.batch import Batch, Lengths, Masks
from njepa.data.loader import build_loader
from njepa.data.sources import open_source
from njepa.draws.masks import MaskSampler
from njepa.draws.order import SampleOrder
from njepa.models.attention import Attention, Sequences
from njepa.models.jepa import JepaOutput
from njepa.objectives import objective
from njepa.training.ema import make_target
from njepa.training.module import TrainModule
from tests.support import ROOT
from tests.support.jobs import TINY, make_images
from tests.support.packed_attention import ATTENTION
from tests.support.tiny import make_batch, rows_of, tiny_config

CPU = torch.device("cpu")
COUNTS = (10, 3, 7, 10, 1)

# The network


def ragged_batch(config: Config, counts: tuple[int, ...] = COUNTS, padding: int = 0) -> Batch:
    batch = make_batch(config, batch=len(counts))
    own = torch.tensor(counts)
    place = torch.arange(batch.masks.context_idx.shape[1])
    context_idx = batch.masks.context_idx.where(place < own[:, None], padding)
    masks = batch.masks._replace(context_idx=context_idx, context_lengths=Lengths(counts, own))
    return batch._replace(masks=masks)


def image_alone(batch: Batch, b: int) -> Batch:
    """Image b with its own tokens and nothing else."""
    assert batch.masks.context_lengths is not None
    n, one = batch.masks.context_lengths.counts[b], rows_of(batch, slice(b, b + 1))
    return one._replace(masks=Masks(one.masks.context_idx[:, :n], one.masks.target_idx))


def features(module: TrainModule, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return make_target(module.jepa.encoder)(batch.images)


def by_loop(config: Config, batch: Batch) -> tuple[torch.Tensor, dict, TrainModule]:
    """Loss, metrics and module: every image through the dense network on its own."""
    module, outputs = TrainModule(config), []
    for b in range(len(batch.images)):
        one = image_alone(batch, b)
        outputs.append(module.jepa(one.images, one.masks, one.noise))

    def rows(name: str) -> torch.Tensor | None:
        """[M*1, Kt, D] of each image to [M*B, Kt, D], row m*B + b."""
        parts = [getattr(output, name) for output in outputs]
        return None if parts[0] is None else torch.stack(parts, dim=1).flatten(0, 1)

    whole = JepaOutput(
        # One token per image, its mean, so that the mean over tokens is that of the image alone.
        torch.cat([output.context.mean(dim=1, keepdim=True) for output in outputs]),
        rows("clean"),
        rows("noised"),
    )
    h = features(module, batch)
    dense = batch.masks._replace(context_lengths=None)
    losses = objective(config, whole, h, dense, module.jepa.projector)
    return losses.total, losses.metrics, module


def shared_context(method: str, **sections: dict[str, Any]) -> Config:
    predictor = {"width": 24, "depth": 2, "heads": 2, "context": "shared"}
    return tiny_config(method, model={"predictor": predictor}, **sections)


CASES = {
    "ijepa": tiny_config("ijepa"),
    "cjepa": tiny_config("cjepa", vicreg={"weight": 0.5}),
    "njepa": tiny_config("njepa"),
    "ncjepa": tiny_config("ncjepa", vicreg={"weight": 0.5}),
    "context": tiny_config("ncjepa", vicreg={"weight": 0.5, "on": "context_vs_target"}),
    "tied": tiny_config("njepa", noise={"space": "encoder_tied", "mask_token": "shared"}),
    "one": tiny_config("njepa", noise={"predictors": "shared", "draw": "shared"}),
    "single": tiny_config("njepa", noise={"predictors": "single"}),
    "shared": shared_context("ijepa"),
    "shared-one": shared_context("ncjepa", vicreg={"weight": 0.5}, noise={"predictors": "shared"}),
}


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("name", CASES)
def test_a_batch_equals_its_images_one_by_one(name: str, kind: str):
    config = CASES[name]
    batch = ragged_batch(config)
    expected, expected_metrics, alone = by_loop(config, batch)
    expected.backward()
    module = TrainModule(config, attention=ATTENTION[kind])
    loss, metrics = module(batch, features(module, batch))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    for key, value in expected_metrics.items():
        torch.testing.assert_close(metrics[key], value, rtol=1e-4, atol=1e-6, msg=key)
    scale = max(p.grad.norm() for p in alone.parameters() if p.requires_grad)
    for key, parameter in alone.named_parameters():
        if parameter.requires_grad:
            error = (module.get_parameter(key).grad - parameter.grad).norm()
            assert error <= 2e-4 * parameter.grad.norm() + 1e-6 * scale, (key, error)
    if config.method in ("ijepa", "njepa"):  # a mean over images: their losses, equally weighted
        images = [image_alone(batch, b) for b in range(len(COUNTS))]
        losses = [alone(one, features(alone, one))[0] for one in images]
        torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=2e-5, atol=1e-6)


def test_the_loop_is_worth_comparing_with():
    """Padding that is attended to, or averaged, shows."""
    for name in ("ijepa", "context", "shared"):
        batch = ragged_batch(CASES[name])
        module = TrainModule(CASES[name])
        right = module(batch, features(module, batch))[0]
        wrong = module(
            batch._replace(masks=batch.masks._replace(context_lengths=None)),
            features(module, batch),
        )[0]
        assert (right - wrong).abs() > 1e-5 * right, name


@pytest.mark.parametrize("kind", ATTENTION)
def test_padding_has_no_influence_and_no_gradient(kind: str):
    config = tiny_config("cjepa", vicreg={"weight": 0.5, "on": "context_vs_target"})
    results = []
    for padding in (0, 17):
        batch = ragged_batch(config, padding=padding)
        module = TrainModule(config, attention=ATTENTION[kind])
        embedded: list[torch.Tensor] = []
        module.jepa.encoder.patch_embed.proj.register_forward_hook(
            lambda _, inputs, output, into=embedded: into.append(output)
        )
        h = features(module, batch)
        loss, _ = module(batch, h)
        embedded[-1].retain_grad()
        loss.backward()
        per_patch = embedded[-1].grad.abs().sum(-1)
        own = torch.arange(per_patch.shape[1]) < torch.tensor(COUNTS)[:, None]
        assert torch.equal(per_patch > 0, own)
        results.append((loss, {n: p.grad for n, p in module.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("kind", ATTENTION)
def test_encoded_padding_is_zero(kind: str):
    config = tiny_config()
    batch, module = ragged_batch(config), TrainModule(config, attention=ATTENTION[kind])
    z = module.jepa.encoder(batch.images, batch.masks.context_idx, batch.masks.context_lengths)
    tokens = torch.arange(z.shape[1]) < torch.tensor(COUNTS)[:, None]
    assert torch.equal(z.abs().sum(-1) > 0, tokens)


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("name", ["ijepa", "ncjepa", "context", "shared"])
def test_equal_counts_are_the_dense_step_bit_for_bit(name: str, kind: str):
    """With SDPA for dense sequences, as ``auto`` has it."""
    config = CASES[name]
    ragged = ragged_batch(config, counts=(10,) * 4)
    attention = Attention(ragged=ATTENTION[kind].ragged)
    results = []
    for batch in (ragged, ragged._replace(masks=ragged.masks._replace(context_lengths=None))):
        module = TrainModule(config, attention=attention)
        loss, _ = module(batch, features(module, batch))
        loss.backward()
        results.append((loss, [p.grad for p in module.parameters() if p.requires_grad]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


class Plain:
    """A packing kernel for tensors without values."""

    name, packs = "plain", True

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Sequences):
        return q + (k + v).mean(dim=(0, 1))  # queries may be fewer than keys


@pytest.mark.parametrize("attention", [Attention(), Attention(ragged=Plain())], ids=["pad", "pack"])
@pytest.mark.parametrize("name", ["ncjepa", "context", "tied", "one", "shared-one"])
def test_no_value_is_read_on_the_host(
    name: str, attention: Attention, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    config = CASES[name]
    module, batch = TrainModule(config, attention=attention).to("meta"), ragged_batch(config)
    loss, metrics = module(batch.to("meta"), torch.empty(len(COUNTS), 36, 32, device="meta"))
    loss.backward()
    assert {value.device.type for value in (loss, *metrics.values())} == {"meta"}


@pytest.mark.parametrize("kind", ATTENTION)
def test_bf16_autocast(kind: str):
    """As close to fp32 as the dense network is on images of its own."""
    config = tiny_config("ijepa")
    batch = ragged_batch(config)
    exact = by_loop(config, batch)[0]
    module = TrainModule(config, attention=ATTENTION[kind])
    with torch.autocast("cpu", torch.bfloat16):
        h = features(module, batch)
        loss, _ = module(batch, h)
        near = by_loop(config, batch)[0]
    loss.backward()
    assert (loss - exact).abs() <= 2 * (near - exact).abs() + 2**-8 * exact
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


# The masks


def sampler(compat: str, ragged: bool) -> MaskSampler:
    return MaskSampler(MaskConfig(compat=compat, min_keep=4, ragged=ragged), (12, 12), seed=5)


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_every_image_keeps_its_whole_context(compat: str):
    """What an image alone has: a batch of one is never cut."""
    ragged, dense = sampler(compat, True), sampler(compat, False)
    ids = np.arange(40, dtype=np.int64) * 7
    saved = []
    for step in range(4):
        masks, cut = ragged(step, ids), dense(step, ids)
        assert masks.context_idx.dtype == np.int64
        np.testing.assert_array_equal(masks.target_idx, cut.target_idx)
        np.testing.assert_array_equal(masks.lengths, cut.lengths)
        assert masks.context_idx.shape == (40, masks.lengths.max())
        assert cut.context_idx.shape == (40, masks.lengths.min())
        for row, n, own in zip(masks.context_idx, masks.lengths, ids, strict=True):
            whole = dense(step, np.array([own])).context_idx[0]
            np.testing.assert_array_equal(row[:n], whole)
            assert (row[n:] == 0).all()
        for row, n, kept in zip(masks.context_idx, masks.lengths, cut.context_idx, strict=True):
            assert set(kept) <= set(row[:n])
        saved.append(1 - cut.context_idx.size / masks.lengths.sum())
    assert min(saved) > 0.05


def test_what_the_cut_drops():
    """The first row of the table in docs/variants.md, ragged masks."""
    masks = MaskSampler(MaskConfig(ragged=True), (14, 14), seed=0)
    ids = np.arange(128, dtype=np.int64)
    lengths = np.stack([masks(step, ids + 128 * step).lengths for step in range(200)])
    assert lengths.min(axis=1).mean() == pytest.approx(60, abs=1)
    assert lengths.mean() == pytest.approx(91, abs=1)
    cut = 1 - lengths.min(axis=1) / lengths.mean(axis=1)
    assert cut.mean() == pytest.approx(0.345, abs=0.01)
    padding = 1 - lengths.mean(axis=1) / lengths.max(axis=1)  # docs/configuration.md, ragged masks
    assert padding.mean() == pytest.approx(0.28, abs=0.01)


def test_no_other_image_decides_anything():
    ragged, ids = sampler("fixed", True), np.arange(30, dtype=np.int64)
    whole, part = ragged(3, ids), ragged(3, ids[11:17])
    np.testing.assert_array_equal(part.lengths, whole.lengths[11:17])
    width = part.context_idx.shape[1]
    np.testing.assert_array_equal(part.context_idx, whole.context_idx[11:17, :width])
    assert (whole.context_idx[11:17, width:] == 0).all()


# The loader


def batches(tmp_path, world: int, rank: int, **mask: object) -> list[Batch]:
    config = load_config(
        "shapes-tiny", [*TINY, "method=njepa", "noise.sigma=edm", f"data.path={tmp_path}/images",
                        *(f"mask.{key}={value}" for key, value in mask.items())],
    )  # fmt: skip
    index = open_source(tmp_path / "images", tmp_path / "cache", progress=False)
    order = SampleOrder(index.n, 8 // world, 1, world, rank, 0)
    masks = MaskSampler(config.mask, config.grid, 0)
    loader = build_loader(config, index, order, masks, CPU, 0, 3)
    try:
        return list(loader)
    finally:
        loader.close()


def test_batches_of_the_loader(tmp_path):
    make_images(tmp_path / "images", 24)
    ragged, dense = (batches(tmp_path, 1, 0, ragged=r) for r in ("true", "false"))
    assert any(batch.masks.context_lengths for batch in ragged)
    for long, short in zip(ragged, dense, strict=True):
        assert short.masks.context_lengths is None
        assert torch.equal(long.sample_ids, short.sample_ids)
        assert torch.equal(long.masks.target_idx, short.masks.target_idx)
        assert torch.equal(long.noise.sigma, short.noise.sigma)
        assert long.cut_frac == short.cut_frac
        total = 8 * long.masks.context_idx.shape[1]
        if long.masks.context_lengths is not None:
            counts = long.masks.context_lengths.counts
            assert long.masks.context_lengths.tensor.tolist() == list(counts)
            assert max(counts) == long.masks.context_idx.shape[1]
            total = sum(counts)
        assert long.cut_frac == pytest.approx(1 - short.masks.context_idx.numel() / total)
        moved = long.to("meta")
        assert long.masks.context_lengths is None or moved.masks.context_lengths.tensor.is_meta


def test_ranks_share_the_work_of_one(tmp_path):
    make_images(tmp_path / "images", 24)
    one = batches(tmp_path, 1, 0, ragged="true")
    halves = [batches(tmp_path, 2, rank, ragged="true") for rank in range(2)]
    for whole, *parts in zip(one, *halves, strict=True):
        counts = whole.masks.context_lengths.counts
        assert {part.cut_frac for part in parts} == {whole.cut_frac}
        for rank, part in enumerate(parts):
            mine = slice(4 * rank, 4 * rank + 4)
            own = counts[mine]
            assert part.masks.context_idx.shape[1] == max(own)
            assert part.masks.context_lengths is None or part.masks.context_lengths.counts == own
            assert torch.equal(part.masks.context_idx, whole.masks.context_idx[mine, : max(own)])
            assert torch.equal(part.masks.target_idx, whole.masks.target_idx[mine])


def test_a_loader_batch_of_equal_contexts_is_dense(tmp_path):
    make_images(tmp_path / "images", 24)
    for batch in batches(tmp_path, 8, 3, ragged="true"):  # one image per rank
        assert batch.masks.context_lengths is None
        assert len(batch.images) == 1
        assert 0 < batch.cut_frac < 1


# The run


@pytest.mark.multirank
def test_what_a_ragged_run_reports(tmp_path):
    make_images(tmp_path / "images", 16)
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 8}')
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "njepa/train.py"), "--ds_config", str(tmp_path / "ds.json"),
            *TINY, "method=cjepa", "vicreg.on=context_vs_target", "mask.ragged=true",
            "run.device=cpu", f"data.path={tmp_path}/images", f"data.cache_dir={tmp_path}/cache",
            f"run.dir={tmp_path}/run",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reason = "sdpa (varlen: needs CUDA; xformers: "
    assert f"attention  {reason}" in done.stdout + done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["attention"].startswith(reason)
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    drawn = batches(tmp_path, 1, 0, ragged="true")
    for line, batch in zip(logged, drawn, strict=True):
        counts = batch.masks.context_lengths.counts
        assert line["k_context"] == sum(counts) / 8
        assert line["context_cut_frac"] == pytest.approx(1 - 8 * min(counts) / sum(counts))
        assert line["context_cut_frac"] > 0
