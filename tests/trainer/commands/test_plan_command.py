"""`njepa plan`: what it prints, and what it refuses."""

import subprocess
import sys

import pytest

from njepa import planning as plan
from njepa.cli import main
from njepa.config import load_config


def test_static_shapes_can_be_planned(capsys: pytest.CaptureFixture[str]):
    arguments = ["--ds_config", "ds.json", "--gpus", "1", "mask.static_shapes=true"]
    assert main(["plan", *arguments]) == 0
    assert "useful GFLOP per image" in capsys.readouterr().out


def test_command(capsys: pytest.CaptureFixture[str]):
    base = ["plan", "--recipe", "shapes-tiny", "--ds_config", "ds.json"]
    assert main([*base, "--gpus", "1,8", "--tflops", "100", "method=ijepa"]) == 0
    out = capsys.readouterr().out
    config = load_config("shapes-tiny", ["method=ijepa"])
    assert f"trained in all {plan.network(config).trained_parameters / 1e6:.2f} M" in out
    assert "100 TFLOP/s" in out
    assert "(nominal, not measured: memory, gbps, nvlink, internode)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8,none"], "--gpus must be positive integers like 8,16,64, got '8,none'"),
        (["--gpus", "0"], "--gpus must be positive integers"),
        (["--gpu", "h300"], "--gpu h300 is unknown; known: a100, h100, h200, b200"),
        (["--tflops", "-1"], "--tflops must be from 0.001 to 1e9, got -1"),
        (["--memory", "nan"], "--memory must be from 0.001 to 1e9, got nan"),
        (["--gbps", "inf"], "--gbps must be from 0.001 to 1e9, got inf"),
        (["--memory", "1e300"], "--memory must be from 0.001 to 1e9, got 1e+300"),
        (["--reserve", "1"], "--reserve must be in [0, 1), got 1"),
        (["--efficiency", "0"], "--efficiency must be from 0.001 to 1, got 0"),
        (["--ds_config", "none.json"], "none.json: no such file"),
        (["--ds_config", "/"], "--ds_config / is a folder"),
        (["--recipe", ""], "unknown recipe ''"),
        (["mask.ragged=true"], "mask.ragged=true is not covered"),
        (["mask.min_keep=30"], "mask.min_keep=30"),
        (["model.encoder=vit_larg"], "did you mean 'vit_large'"),
        (["mask.target_scale=[0.9, 0.9]"], "leaves at most"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--ds_config", "ds.json", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_needs_no_gpu_and_no_deepspeed():
    code = (
        "import sys; sys.modules['deepspeed'] = None; from njepa.cli import main; "
        "sys.exit(main(['plan', '--ds_config', 'ds.json', '--gpus', '2']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
