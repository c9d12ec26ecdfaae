"""Attention kernels: how sequences lie, what a kernel must compute, which one is taken and why."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from njepa import train
from njepa.config import ConfigError, MaskConfig, ModelConfig
from njepa.config.deepspeed_file import parse_deepspeed
from njepa.data.batch import Lengths
from njepa.models import attention_kernels
from njepa.models.attention import Attention, Sdpa, Sequences
from njepa.models.attention_kernels import FLASH_FIRST, choose_attention, load_kernel, probe
from njepa.models.block import Block
from njepa.training.zero import compute_dtype
from tests.support.packed_attention import ATTENTION, VARLEN, XFORMERS, fake_fmha

CPU = torch.device("cpu")
COUNTS = (3, 7, 1, 4)
HEADS, WIDTH = 2, 8


def lengths(*counts: int) -> Lengths:
    return Lengths(counts, torch.tensor(counts))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(counts: tuple[int, ...], length: int, tail: int, row: int) -> list[int]:
    """The places of a sequence's tokens, by the words of the docstring."""
    n = counts[row % len(counts)]
    return [*range(n), *range(length - tail, length)]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(h)) v, spelled out, for one sequence: [n, H, h]."""
    scores = torch.einsum("qhc,khc->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khc->qhc", scores.softmax(-1), v)


@pytest.mark.parametrize(("tail", "repeat"), [(0, 1), (5, 3)], ids=["encoder", "predictor"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_each_sequence_attends_to_its_own_tokens(kind: str, tail: int, repeat: int):
    rows, length = repeat * len(COUNTS), max(COUNTS) + tail
    sequences = ATTENTION[kind].sequences(rows, length, lengths(*COUNTS), tail)
    inputs = draw(3, rows, length, HEADS * WIDTH).requires_grad_()
    q, k, v = (sequences.enter(x).unflatten(2, (HEADS, WIDTH)) for x in inputs)
    packed = kind != "padded"
    assert q.shape[:2] == ((1, (sum(COUNTS) + tail * len(COUNTS)) * repeat) if packed
                           else (rows, length))  # fmt: skip
    entered = sequences.kernel(q, k, v, sequences).flatten(2)
    out = sequences.leave(entered)
    weight = draw(rows, length, HEADS * WIDTH, seed=1)
    (out * weight).sum().backward()

    reference = inputs.detach().double().requires_grad_()
    expected = torch.zeros(rows, length, HEADS * WIDTH, dtype=torch.float64)
    for row in range(rows):
        own = tokens_of(COUNTS, length, tail, row)
        one = (x[row, own].unflatten(1, (HEADS, WIDTH)) for x in reference)
        expected[row, own] = attend(*one).flatten(1)
    (expected * weight).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)
    padding = reference.grad[2] == 0  # only where nothing attends is dv exactly 0
    assert padding.any()
    assert torch.equal(out == 0, padding)
    assert torch.count_nonzero(inputs.grad[:, padding]) == 0
    if tail:
        assert torch.equal(sequences.last(entered, tail), out[:, -tail:])


@pytest.mark.parametrize("queries", [(2, 5, 3, 3), (4, 4, 4, 4)], ids=["ragged", "dense"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_queries_over_keys_of_other_lengths(kind: str, queries: tuple[int, ...]):
    attention = ATTENTION[kind]
    ours = attention.sequences(4, max(queries), lengths(*queries))
    theirs = attention.sequences(4, max(COUNTS), lengths(*COUNTS))
    cross = ours.over(theirs)
    q, k, v = draw(4, max(queries), 16), *draw(2, 4, max(COUNTS), 16, seed=1)
    entered = (s.enter(x).unflatten(2, (2, 8)) for s, x in ((ours, q), (theirs, k), (theirs, v)))
    out = ours.leave(cross.kernel(*entered, cross).flatten(2))
    for row, (n, m) in enumerate(zip(queries, COUNTS, strict=True)):
        one = (x.unflatten(1, (2, 8)) for x in (q[row, :n], k[row, :m], v[row, :m]))
        torch.testing.assert_close(out[row, :n], attend(*one).flatten(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ATTENTION)
def test_equal_lengths_are_dense(kind: str):
    attention = ATTENTION[kind]
    dense = attention.sequences(6, 9, lengths(4, 4, 4), tail=5)
    assert (dense.mask, dense.index, dense.kernel) == (None, None, attention.dense)
    padded = attention.sequences(6, 10, lengths(4, 4, 4), tail=5)  # all equal, and yet padded
    assert padded.mask is not None or padded.index is not None
    x = draw(6, 9, 16)
    assert dense.enter(x) is x
    assert dense.leave(x) is x
    assert torch.equal(dense.last(x, 5), x[:, 4:])


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_block_is_timms_with_any_kernel(kind: str):
    """Same keys, same values: strictly for SDPA, which gets the tensors that timm's block gives."""
    torch.manual_seed(3)
    theirs = TimmBlock(16, 2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    ours = Block(16, 2, 64)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = draw(5, 6, 16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [ours(inputs[0], ATTENTION[kind].sequences(5, 6)), theirs(inputs[1])]
    for output in outputs:
        (output * draw(5, 6, 16, seed=1)).sum().backward()
    exact = {"rtol": 0.0, "atol": 0.0} if kind == "padded" else {}
    torch.testing.assert_close(*outputs, **exact)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **exact)
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_p.grad, theirs_p.grad, **exact)


@pytest.mark.parametrize("kind", ["padded", "varlen"])
def test_a_ragged_block_is_one_graph(kind: str):
    block, attention = Block(16, 2, 64), ATTENTION[kind]
    if kind == "varlen":  # without the stand-in's checks, which read values
        attention = Attention(Sdpa(), Trivial())

    def run(x: torch.Tensor, own: Lengths) -> torch.Tensor:
        sequences = attention.sequences(4, 7, own)
        return sequences.leave(block(sequences.enter(x), sequences))

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    x = draw(4, 7, 16)
    torch.testing.assert_close(compiled(x, lengths(*COUNTS)), run(x, lengths(*COUNTS)))


@dataclass(frozen=True)
class Trivial:
    """A packing kernel that returns the values as they are."""

    name = "trivial"
    packs = True

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Sequences):
        return v


# The probe


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
        ("scale", "wrong by"), ("sees padding", "wrong by"), ("nan", "wrong by nan"),
        ("a gradient is lost", "gradient is wrong by"), ("takes k as dense", "wrong by"),
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
    assert "xformers: the probe failed: output is wrong by" in str(choose(ragged=True)) or (
        "xformers: the probe failed: gradient is wrong by" in str(choose(ragged=True))
    )
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


def test_an_order_ends_with_its_block_and_changes_no_value():
    """It only prefers: what none of the first backends can do falls to a later one."""
    q, k, v = draw(3, 2, 9, 2, 8)
    sequences = Attention().sequences(2, 9)
    before, plain = torch._C._get_sdp_priority_order(), Sdpa()(q, k, v, sequences)
    with Attention(order=FLASH_FIRST).ordered():
        first = torch._C._get_sdp_priority_order()[: len(FLASH_FIRST)]
        assert first == [int(backend) for backend in FLASH_FIRST]
        torch.testing.assert_close(Sdpa()(q, k, v, sequences), plain)
    assert torch._C._get_sdp_priority_order() == before
    assert torch.backends.cuda.math_sdp_enabled()


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
