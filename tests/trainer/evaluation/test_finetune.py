"""Fine-tuning through timm: our features at the start, a network that learns, clear refusals."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from njepa.config import ConfigError
from njepa.evaluation import finetune as module
from njepa.evaluation.finetune import finetune, require_timm
from njepa.evaluation.subject import open_subject
from njepa.evaluation.task import open_task
from tests.support.subjects import make_run, make_stripes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("finetune")
    subject = open_subject(str(make_run(root / "run", "model.depth=2")))
    make_stripes(root / "train", 96)
    make_stripes(root / "test", 30, seed=1)
    return subject, open_task(root / "train", root / "test", root / "cache", (None, None), 0)


def test_timms_network_starts_from_our_features(world):
    subject, _ = world
    network = module._network(require_timm(), subject, 3).eval()
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor(subject.weights.mean), torch.tensor(subject.weights.std)
    x = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    found = network.forward_features(x)
    torch.testing.assert_close(found, subject.encoder(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_learns_and_touches_neither_subject_nor_generators(world, monkeypatch):
    subject, task = world
    monkeypatch.setattr(module, "BASE_LR", 2e-2)
    before = {name: value.clone() for name, value in subject.encoder.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    result = finetune(subject, task.train, task.test, 3, 12, 32, "cpu", workers=0)
    assert result.top1 > 60  # of three classes
    assert result.n == 30
    assert all(torch.equal(before[n], v) for n, v in subject.encoder.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_refusals(world, monkeypatch):
    subject, task = world
    with pytest.raises(ConfigError, match=r"needs as many training images, got 96; use --batch-"):
        finetune(subject, task.train, task.test, 3, 1, 256, "cpu")
    bad = replace(task.train, index=replace(task.train.index, names=["gone.jpg"] * 96))
    with pytest.raises(ConfigError, match=r"gone.jpg cannot be decoded .* `njepa scan`"):
        finetune(subject, bad, task.test, 3, 1, 32, "cpu", workers=0)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"takes its recipe from timm.*pip install 'njepa\[fine"):
        require_timm()
