"""Rules of the layout that break a launch when they are broken."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_file_of_the_trainer_shadows_another_module():
    """`deepspeed njepa/train.py` puts njepa/ first on sys.path."""
    ours = {p.stem for p in (ROOT / "njepa").glob("*.py")} | {
        p.name for p in (ROOT / "njepa").iterdir() if p.is_dir()
    }
    others = set(sys.stdlib_module_names) | {
        name for name in packages_distributions() if name not in ("njepa", "njepa_kernels")
    }
    assert ours & others == set()


def test_kernels_folder_is_not_a_package():
    """A `kernels` package at the root would shadow Hugging Face's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def imports(path: Path) -> set[str]:
    """The packages that a file imports, by their first name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def test_imports_go_one_way():
    """njepa -> njepa_kernels; bench uses both, tests use all; what is published stands alone."""
    forbidden = {
        "kernels": {"njepa", "bench", "tests"},
        "njepa": {"bench", "tests"},
        "bench": {"tests"},
        "bench/published": {"njepa", "njepa_kernels", "timm"},
    }
    for folder, names in forbidden.items():
        files = list((ROOT / folder).rglob("*.py"))
        assert len(files) > 4
        for path in files:
            assert imports(path) & names == set(), path


def test_no_file_changes_the_path_of_imports():
    """Tests and benchmarks are packages; programs that they start find them by PYTHONPATH."""
    change = re.compile(r"sys\.path(\.(insert|append|extend)|\[.*\] *=| *\+?= )")
    for folder in ("bench", "tests", "njepa", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not change.search(path.read_text("utf-8")), path


def test_a_typing_error_costs_no_import_of_torch():
    code = (
        "import sys; from njepa import train\n"
        "assert train.main(['optim.lrr=1']) == 2\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'lr'?" in done.stderr


def test_options_and_overrides_may_stand_in_any_order():
    from njepa.train import parser

    line = ["--local_rank=0", "a=1", "--recipe", "R", "b=2", "--deepspeed_config", "x.json", "c=3"]
    args = parser().parse_intermixed_args(line)
    assert (args.recipe, args.ds_config) == ("R", "x.json")
    assert args.overrides == ["a=1", "b=2", "c=3"]


def test_info_names_recipes_ops_and_keys(capsys):
    from njepa import cli

    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "shapes-tiny: njepa" in shown
    assert "vicreg" in shown
    assert "    native: " in shown
    assert "    reference: yes" in shown
    assert cli.main(["info", "--keys"]) == 0
    shown = capsys.readouterr().out
    assert "noise.sigma = 0.5" in shown
    assert "noise.mask_token = unshared" in shown
    assert cli.main(["trian"]) == 2
    assert "unknown command 'trian'; did you mean 'train'?" in capsys.readouterr().err
