"""The folder for Hugging Face's kernels: what it holds, and that it loads beside the package."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from njepa_kernels import available_impls
from njepa_kernels._runtime import library
from njepa_kernels.tools import export_hf

from tests.support import program_env

TRAINER = ["timm", "deepspeed", "nvidia", "pydantic", "torchvision", "PIL", "safetensors", "njepa"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "ops"
    assert export_hf.main([str(out)]) == 0
    return out


def _run(code: str, folder: Path, **env: str) -> str:
    blocked = f"import sys\nfor name in {TRAINER!r}:\n    sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + textwrap.dedent(code), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "home"), **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_metadata(folder: Path) -> None:
    ids = set()
    for backend in ("cuda", "cpu"):
        build = folder / "build" / f"torch-{backend}"
        metadata = json.loads((build / "metadata.json").read_text())
        ids.add(metadata.pop("id"))
        assert metadata == {
            "name": "njepa-kernels",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        assert (
            f'NAMESPACE = "njepa_kernels_{backend}_' in (build / "_runtime/library.py").read_text()
        )
    assert len(ids) == 2
    assert all(name.isidentifier() for name in ids)


def test_only_relative_imports_and_one_place_with_the_namespace(folder: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    build = folder / "build" / "torch-cuda"
    files = sorted(build.rglob("*.py"))
    assert len(files) > 25
    for path in files:
        assert path.name not in ("native.py", "cases.py", "testing.py")
        tree = ast.parse(path.read_text())
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            assert {name.partition(".")[0] for name in names} <= allowed, (path, names)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = "" if id(node) in docstrings else node.value
                assert text != library.NAMESPACE, path
                assert f"{library.NAMESPACE}::" not in text, path
            if isinstance(node, ast.Attribute) and node.attr.startswith(library.NAMESPACE):
                pytest.fail(f"{path}:{node.lineno} names {node.attr}")
    assert not [p for p in build.rglob("*") if p.suffix in (".so", ".pyc", ".yaml")]


def test_the_same_content_gives_the_same_id_and_another_another(tmp_path: Path) -> None:
    files = export_hf.sources()
    assert export_hf.build_id(files, "cuda") == export_hf.build_id(dict(files), "cuda")
    changed = {**files, "nn.py": files["nn.py"] + "\n"}
    assert export_hf.build_id(changed, "cuda") != export_hf.build_id(files, "cuda")
    first, second = (export_hf.export(tmp_path / name)[0] for name in ("a", "b"))
    for path in sorted(first.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("")
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        export_hf.export(tmp_path)
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        export_hf.export(tmp_path / "precious")
    with pytest.raises(SystemExit) as stop:
        export_hf.main([str(tmp_path)])
    assert stop.value.code == 2
    assert "must be a new or an empty folder" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["precious"]


@pytest.mark.parametrize("backend", ["cuda", "cpu"])
def test_values_beside_the_installed_package(folder: Path, backend: str) -> None:
    """All small cases, forward and backward, in both; the loaded one has operators of its own."""
    out = _run(
        f"""
        import importlib
        import pkgutil
        from pathlib import Path
        import torch
        import njepa_kernels
        from kernels import get_local_kernel
        from njepa_kernels.testing import all_cases, evaluate

        # kernels picks by the build of torch; where that has no CUDA only "cpu" can be asked for.
        backend = {backend!r} if torch.version.cuda else "cpu"
        ops = get_local_kernel(Path(sys.argv[1]), backend=backend)
        assert ops is not njepa_kernels and ops.__name__ in sys.modules
        namespaces = [package._runtime.library.NAMESPACE for package in (ops, njepa_kernels)]
        assert namespaces[0] == ops.__name__ != namespaces[1]
        assert ops.__all__ == njepa_kernels.__all__
        assert set(ops.available_impls()) == set(njepa_kernels.available_impls())
        assert {{row["native"] for row in ops.available_impls().values()}} == {{
            "the native library is not built"
        }}
        # No module of the folder needs one that was left out.
        for module in pkgutil.walk_packages(ops.__path__, ops.__name__ + "."):
            importlib.import_module(module.name)
        checked = set()
        for case in all_cases(small=True):
            inputs = case.make_inputs(torch.device("cpu"), torch.float32, 0)
            want = evaluate(case, case.reference, inputs)
            for impl in ("auto", "reference"):
                function = getattr(ops, case.op)
                got = evaluate(case, lambda **kw: function(**kw, impl=impl), inputs)
                for name, value in got.items():
                    torch.testing.assert_close(
                        value, want[name], rtol=0, atol=0, equal_nan=True, msg=case.name + name
                    )
            # and the installed package still works
            evaluate(case, case.function, inputs)
            checked.add(case.op)
        for name in checked:
            operators = [getattr(torch.ops, namespace) for namespace in namespaces]
            first, second = (getattr(operator, name) for operator in operators)
            assert first is not second
        print(sorted(checked))
        """,
        folder,
    )
    assert out.strip() == (str(sorted(available_impls())))


@pytest.mark.slow
def test_triton_kernels_of_the_folder_run(folder: Path) -> None:
    """Through the folder's own operators, in Triton's interpreter."""
    out = _run(
        """
        from pathlib import Path
        import torch
        import njepa_kernels
        from kernels import get_local_kernel
        from njepa_kernels.testing import all_cases, assert_within_baseline, evaluate

        ops = get_local_kernel(Path(sys.argv[1]))
        assert {row["triton"] for row in ops.available_impls().values()} == {"yes"}
        for op in ops.available_impls():
            case = all_cases(op, small=True)[1]
            inputs = case.make_inputs(torch.device("cpu"), torch.float32, 0)
            want = evaluate(case, case.reference, inputs)
            function = getattr(ops, op)
            got = evaluate(case, lambda **kw: function(**kw, impl="triton"), inputs)
            for name, value in got.items():
                torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5)
            print(op)
        """,
        folder,
        TRITON_INTERPRET="1",
    )
    assert out.split() == list(available_impls())


def test_layers_replace_forwards(folder: Path) -> None:
    """kernelize puts the folder's forwards into classes of others; values stay."""
    out = _run(
        """
        from pathlib import Path
        import torch
        from bench.published import script as style
        from kernels import (
            LocalLayerRepository, Mode, kernelize, register_kernel_mapping,
            replace_kernel_forward_from_hub,
        )
        from njepa_kernels import NoiseKey, nn as ours

        table = torch.randn(16, 32)
        hosts = dict(
            GatherTokens=ours.GatherTokens(), PredictorTokens=ours.PredictorTokens(32, table),
            PredictionLoss=ours.PredictionLoss(), VICReg=ours.VICReg(),
            Encoder=style.Encoder(), Predictor=style.Predictor(),
        )
        context, target = style.draw_masks(3, 16, 7, 3)
        idx = torch.stack(target, 1)
        x, images = torch.randn(3, 16, 32), torch.randn(3, 3, 16, 16)
        pred, noised = torch.randn(2, 12, 3, 32)
        key = NoiseKey(1, 2, torch.arange(3))  # the class of the installed package
        args = dict(
            GatherTokens=(x, idx),
            PredictorTokens=(x[:, :7], context[0], idx, torch.rand(3, 4), key),
            PredictionLoss=(pred, x, idx, noised), VICReg=(x,),
            Encoder=(images, context), Predictor=(x[:, :7], context, target),
        )
        for name, host in hosts.items():
            want = host(*args[name])
            cls = type(host)
            replace_kernel_forward_from_hub(cls, name)
            layer = LocalLayerRepository(Path(sys.argv[1]), layer_name=name)
            register_kernel_mapping(
                {name: {"cuda": layer, "cpu": layer}}, inherit_mapping=False
            )
            before = host.forward.__func__
            mode = Mode.TRAINING | Mode.TORCH_COMPILE
            host = kernelize(host, mode=mode, device="cpu", use_fallback=False)
            assert host.forward.__func__ is not before
            assert "njepa_kernels_cuda_" in host.forward.__func__.__module__
            got = host(*args[name])
            torch.testing.assert_close(got, want)
            print(name)
        """,
        folder,
        PYTHONPATH=program_env()["PYTHONPATH"],
    )
    assert out.split() == [
        "GatherTokens",
        "PredictorTokens",
        "PredictionLoss",
        "VICReg",
        "Encoder",
        "Predictor",
    ]
