"""The DeepSpeed file: what it owns, what it must not hold, and its batch arithmetic."""

import json
import re

import pytest
import torch

from njepa.config import ConfigError
from njepa.config.deepspeed_file import BatchSizes, load_deepspeed_file, parse_deepspeed
from njepa.training.zero import engine_config
from tests.support import ROOT


def write(tmp_path, text):
    path = tmp_path / "ds.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold an object, got list"),
        ('{"train_batch_size": 1, "train_batch_size": 2}', "gives ['train_batch_size'] twice"),
        ({"optimizer": {}}, "'optimizer' is not accepted: the recipe owns the optimizer"),
        ({"scheduler": {}}, "the recipe owns the schedules"),
        ({"fp16": {"enabled": True}}, "use bf16 or torch_autocast"),
        ({"gradient_cliping": 1}, "did you mean 'gradient_clipping'?"),
        ({"lr": 1}, "unknown key 'lr'"),
        ({"zero_optimization": {"stage": 4}}, "must be 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
         "offload_optimizer is not supported"),
        ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": "auto"}}, "exclude each other"),
        ({"bf16": {"enabled": True}}, "bf16 needs zero_optimization.stage >= 1, got 0"),
        ({"torch_autocast": {"dtype": "float16"}}, "must be bfloat16, got 'float16'"),
        ({"zero_optimization": 2}, "zero_optimization must be an object like {...}, got 2"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}},
         "compute_grad_norm=false is not supported"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True, "check_grad_overflow": 0}},
         "check_grad_overflow=false is not supported"),
    ],
)  # fmt: skip
def test_refused_files(tmp_path, content, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_deepspeed_file(write(tmp_path, content))


def test_missing_file():
    with pytest.raises(ConfigError, match=r"nowhere\.json: no such file"):
        load_deepspeed_file("nowhere.json")


@pytest.mark.parametrize("world", [1, 2, 8])
def test_shipped_files_are_accepted(world):
    files = [ROOT / "ds.json", *sorted((ROOT / "njepa/recipes").glob("*.json"))]
    assert len(files) == 8
    for file in files:
        ds = load_deepspeed_file(file)
        if world > 1 and "one-gpu" in file.name:
            continue
        assert ds.resolve(world).total == (ds.batch or 64 * world)


@pytest.mark.parametrize(
    ("ds", "world", "expected"),
    [
        ((None, 32, None), 2, (32, 1)),
        ((None, 32, 4), 2, (32, 4)),
        ((256, None, None), 4, (64, 1)),
        ((256, None, 2), 4, (32, 2)),
        ((256, 16, None), 4, (16, 4)),
        ((256, 16, 4), 4, (16, 4)),
    ],
)
def test_batch_arithmetic(ds, world, expected):
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    given = {n: v for n, v in zip(names, ds, strict=True) if v is not None}
    sizes = parse_deepspeed(given).resolve(world)
    assert (sizes.micro, sizes.accumulation) == expected
    assert sizes.total == expected[0] * expected[1] * world


@pytest.mark.parametrize(
    ("ds", "message"),
    [
        ({}, "must give train_batch_size or train_micro_batch_size_per_gpu"),
        ({"train_batch_size": 100}, "100 is not a multiple of gradient_accumulation_steps=1 x 3"),
        ({"train_batch_size": 2}, "2 is not a multiple"),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 32}, "32 x 3 ranks"),
        (
            {
                "train_batch_size": 64,
                "train_micro_batch_size_per_gpu": 32,
                "gradient_accumulation_steps": 2,
            },
            "= 192; drop one of the three",
        ),
        ({"train_batch_size": "many"}, "must be a positive integer, got 'many'"),
        ({"train_micro_batch_size_per_gpu": True}, "must be a positive integer, got True"),
    ],
)
def test_batch_errors_show_the_numbers(ds, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_deepspeed(ds).resolve(3)


@pytest.mark.parametrize(("ds", "limit"), [({}, 0.0), ({"gradient_clipping": 0.5}, 0.5)])
def test_nothing_is_clipped_unless_the_file_says_so(ds, limit):
    """DeepSpeed itself reads a file without the key as 1.0."""
    from deepspeed.runtime.config import get_gradient_clipping

    config = engine_config(parse_deepspeed(ds), BatchSizes(4, 1, 1), torch.device("cpu"))
    assert get_gradient_clipping(config) == limit
