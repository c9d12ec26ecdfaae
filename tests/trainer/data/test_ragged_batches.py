"""Ragged masks from the loader to the lines of a run: what a batch holds, and what is logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from njepa.config import load_config
from njepa.data.batch import Batch
from njepa.data.loader import build_loader
from njepa.data.sources import open_source
from njepa.draws.masks import MaskSampler
from njepa.draws.order import SampleOrder
from tests.support import ROOT
from tests.support.jobs import TINY, make_images

CPU = torch.device("cpu")


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
