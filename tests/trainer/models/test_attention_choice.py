"""Attention kernels: which one is taken and why, and how a wrong one is found out."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass

import pytest
import torch

from njepa import train
from njepa.config import ConfigError, MaskConfig, ModelConfig
from njepa.config.deepspeed_file import parse_deepspeed
from njepa.models import attention_kernels
from njepa.models.attention import Sdpa, Sequences
from njepa.models.attention_kernels import FLASH_FIRST, choose_attention, load_kernel, probe
from njepa.training.zero import compute_dtype
from tests.support.packed_attention import VARLEN, XFORMERS, fake_fmha

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Faulty:
    """A padded kernel with one fault."""

    fault: str
    name = "faulty"
    packs = False

    def __call__(self, q, k, v, sequences):
        if self.fault == "raises":
            raise NotImplementedError("no operator found\nfor these inputs")
        if self.fault == "a gradient is lost":
            k = k.detach()
        if self.fault == "takes k as dense":
            k = k.as_strided(k.shape, torch.empty(k.shape).stride())
        if self.fault == "scale":
            q = q * 1.01
        if self.fault == "sees padding" and sequences.mask is not None:
            sequences = Sequences(self, sequences.rows, sequences.length)
        out = Sdpa()(q, k, v, sequences)
        return out * float("nan") if self.fault == "nan" else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", [Sdpa(), VARLEN, XFORMERS], ids=["sdpa", "varlen", "xformers"])
def test_a_right_kernel_passes_the_probe(kernel, dtype: torch.dtype):
    for width in (8, 24, 80):
        probe(kernel, CPU, dtype, width)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("scale", "differs from SDPA by"), ("sees padding", "differs from SDPA by"),
        ("nan", "differs from SDPA by nan"), ("takes k as dense", "differs from SDPA by"),
        ("a gradient is lost", "gradient differs from SDPA by"),
        ("raises", "no operator found"),
    ],
)  # fmt: skip
def test_a_wrong_kernel_does_not(fault: str, message: str):
    with pytest.raises(RuntimeError, match=message):
        probe(Faulty(fault), CPU, torch.float32, 16)


def choose(wanted: str = "auto", ragged: bool = False, dtype: torch.dtype = torch.float32):
    return choose_attention(
        ModelConfig(attention=wanted), MaskConfig(ragged=ragged), {16, 24}, CPU, dtype
    )


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Neither mslk nor xformers, whatever is installed here."""
    for name in ("mslk", "xformers"):
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)  # import raises
    return monkeypatch


def install(patch: pytest.MonkeyPatch, name: str) -> object:
    parts = name.split(".")
    for end in range(1, len(parts)):
        patch.setitem(sys.modules, ".".join(parts[:end]), fake_fmha(parts[end - 1]))
    module = fake_fmha(name)
    patch.setitem(sys.modules, name, module)
    return module


def test_auto_on_a_cpu(no_packages: pytest.MonkeyPatch):
    assert str(choose()) == "sdpa (dense masks; xformers: not installed)"
    ragged = choose(ragged=True)
    assert str(ragged) == (
        "sdpa (varlen: needs CUDA; xformers: not installed; ragged masks are padded)"
    )
    assert ragged.dense == ragged.ragged == Sdpa()


def test_products_in_bf16_on_a_cpu(no_packages: pytest.MonkeyPatch):
    """SDPA's backward is slow there; where no gradient is needed SDPA stays, with its bits."""
    chosen = choose(dtype=torch.bfloat16)
    assert chosen.dense == Sdpa(products=True)
    assert str(chosen) == (
        "sdpa (dense masks; two products where a gradient is needed; xformers: not installed)"
    )
    assert choose().dense == choose(dtype=torch.float16).dense == Sdpa()
    for width in (32, 64):  # ragged and dense, values and gradients, against fp64
        probe(chosen.dense, CPU, torch.bfloat16, width)
    q, k, v = torch.randn(3, 2, 9, 4, 32).bfloat16()
    sequences = chosen.sequences(2, 9)
    plain = Sdpa()(q, k, v, sequences)
    assert torch.equal(chosen.dense(q, k, v, sequences), plain)
    with_gradient = chosen.dense(q.requires_grad_(), k, v, sequences)
    assert with_gradient.dtype == torch.bfloat16
    assert not torch.equal(with_gradient, plain)  # other roundings: it did run


def test_auto_takes_xformers_where_it_works(no_packages: pytest.MonkeyPatch):
    module = install(no_packages, "xformers.ops.fmha")
    ragged = choose(ragged=True)
    assert str(ragged) == "xformers (sdpa where all lengths are equal; varlen: needs CUDA)"
    assert ragged.dense == Sdpa()
    assert ragged.ragged.function is module.memory_efficient_attention
    assert str(choose()) == "sdpa (dense masks; xformers: for ragged masks only)"
    assert str(choose("xformers")) == "xformers (as configured)"
    newer = install(no_packages, "mslk.attention.fmha")
    assert choose("xformers").dense.function is newer.memory_efficient_attention


def test_auto_leaves_a_package_that_only_imports(no_packages: pytest.MonkeyPatch):
    module = install(no_packages, "xformers.ops.fmha")

    def refuses(*_: object, **__: object) -> None:
        raise NotImplementedError("No operator found for these inputs\n  query: ...")

    no_packages.setattr(module, "memory_efficient_attention", refuses)
    assert str(choose(ragged=True)) == (
        "sdpa (varlen: needs CUDA; xformers: no CPU operator for fp32 and heads of width 16; "
        "ragged masks are padded)"
    )

    def other_scale(query, key, value, attn_bias=None):
        return fake_fmha("x").memory_efficient_attention(2 * query, key, value, attn_bias)

    no_packages.setattr(module, "memory_efficient_attention", other_scale)
    failed = r"xformers: the probe failed: (output|gradient) differs from SDPA by"
    assert re.search(failed, str(choose(ragged=True)))
    assert choose(ragged=True).ragged == Sdpa()
    no_packages.delattr(module, "memory_efficient_attention")
    assert "no attribute" in str(choose(ragged=True))


def test_a_broken_package_is_not_called_missing(no_packages: pytest.MonkeyPatch):
    module = install(no_packages, "xformers.ops.fmha")
    no_packages.setitem(sys.modules, "xformers.ops.fmha", None)
    assert "xformers: not installed;" in str(choose(ragged=True))  # too old for this module

    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "xformers.ops.fmha":
                raise ImportError("libcudart.so.12: cannot open shared object file")

    no_packages.delitem(sys.modules, "xformers.ops.fmha")
    no_packages.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    no_packages.setattr(sys.modules["xformers.ops"], "__path__", [], raising=False)
    reason = "the import of xformers.ops.fmha failed: libcudart.so.12: cannot open"
    assert f"xformers: {reason}" in str(choose(ragged=True))
    newer = install(no_packages, "mslk.attention.fmha")
    assert choose(ragged=True).ragged.function is newer.memory_efficient_attention
    assert newer is not module


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [("varlen", "needs CUDA"), ("xformers", "not installed")],
)
@pytest.mark.parametrize("ragged", [False, True])
def test_what_cannot_run_is_refused(
    wanted: str, reason: str, ragged: bool, no_packages: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match=f"model.attention={wanted} .*fp32: {reason}; set"):
        choose(wanted, ragged)


@pytest.mark.parametrize(
    ("ds", "cpu", "cuda"),
    [
        ({}, "float32", "float32"),
        ({"torch_autocast": {"enabled": "auto"}}, "float32", "bfloat16"),
        ({"torch_autocast": {"enabled": True}}, "bfloat16", "bfloat16"),
        ({"torch_autocast": {"enabled": False}}, "float32", "float32"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "bfloat16", "bfloat16"),
    ],
)
def test_type_that_is_probed(ds: dict, cpu: str, cuda: str):
    for device, name in (("cpu", cpu), ("cuda", cuda)):
        assert compute_dtype(parse_deepspeed(ds), torch.device(device)) is getattr(torch, name)


def test_it_is_refused_before_the_images_are_looked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 4}')
    line = ["model.attention=varlen", "data.path=nowhere", "run.device=cpu", "run.dir=run"]
    assert train.main(line) == 2
    message = capsys.readouterr().err
    assert "model.attention=varlen cannot run on cpu in fp32: needs CUDA" in message
    assert "nowhere" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("capability", "static", "wanted", "flash", "reason"),
    [
        ((9, 0), False, "auto", True, "flash before cuDNN, which plans each new shape"),
        ((9, 0), False, "sdpa", True, "flash before cuDNN, which plans each new shape"),
        ((9, 0), True, "auto", False, "cuDNN before flash: static shapes"),
        ((10, 0), False, "auto", True, "flash before cuDNN, which plans each new shape"),
        ((8, 0), False, "auto", False, None),
        ((12, 0), True, "auto", False, None),
    ],
)
def test_cudnn_is_first_for_static_shapes_only(
    capability, static: bool, wanted: str, flash: bool, reason: str | None, monkeypatch
):
    """Where torch itself tries it first; the start table says which, and why."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention_kernels, "probe", lambda *_: None)
    model, mask = ModelConfig(attention=wanted), MaskConfig(static_shapes=static)
    cuda = torch.device("cuda")
    chosen = choose_attention(model, mask, {64}, cuda, torch.bfloat16)
    assert chosen.order == (FLASH_FIRST if flash else ())
    assert ("cuDNN" not in str(chosen)) if reason is None else (f"; {reason}" in str(chosen))


def test_a_cudnn_that_fails_is_not_first(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> None:
        raise RuntimeError("no execution plan\nfor this graph")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention_kernels, "probe", fails)
    chosen = choose_attention(
        ModelConfig(), MaskConfig(static_shapes=True), {64}, torch.device("cuda"), torch.bfloat16
    )
    assert chosen.order == FLASH_FIRST
    assert "; flash before cuDNN: the probe failed: no execution plan;" in str(chosen)


def test_varlen_of_this_torch_takes_what_we_pass():
    from torch.nn.attention.varlen import varlen_attn

    signature = inspect.signature(varlen_attn)
    assert list(signature.parameters)[:7] == [
        "query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k",
    ]  # fmt: skip
    signature.bind(*range(7))  # nothing else is required


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["sdpa", "varlen"])
def test_probe_on_the_gpu(name: str):
    device = torch.device("cuda")
    kernel = load_kernel(name, device, torch.bfloat16)
    for width in (32, 64, 80):
        probe(kernel, device, torch.bfloat16, width)
