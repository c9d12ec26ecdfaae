"""Rules of the layout that break a launch when they are broken."""

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


def test_a_typing_error_costs_no_import_of_torch():
    code = (
        "import sys; from njepa import train\n"
        "assert train.main(['optim.lrr=1']) == 2\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'lr'?" in done.stderr
