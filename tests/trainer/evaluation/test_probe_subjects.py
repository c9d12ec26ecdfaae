"""``njepa probe`` of one network in every form that a subject may have."""

import json
import shutil

import huggingface_hub
import pytest

from njepa import cli
from njepa.evaluation.subject import open_subject
from njepa.exchange.export import export
from tests.support.subjects import make_stripes
from tests.support.weight_sources import config_of, network, write_run

#: Name on the command line: which of its encoders it says that it has.
BOTH, TARGET, ONE = ("target", "context"), ("target",), ()
SUBJECTS = {
    "run": BOTH,
    "run/checkpoints/step-00000007": BOTH,
    "ijepa": BOTH,
    "ijepa/ijepa.pth.tar": BOTH,
    "timm": TARGET,
    "transformers": TARGET,
    "safetensors": TARGET,
    "safetensors/model.safetensors": TARGET,
    "vit_own_patch8.ijepa": ONE,  # the last two are names in Hugging Face's cache
    "someone/own-ijepa": ONE,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("subjects")
    config = config_of("njepa")
    write_run(root / "run", config, *network(config))
    for form in ("timm", "transformers", "ijepa", "safetensors"):
        export(str(root / "run"), root / form, form)
    for repository, form in (("timm--vit_own_patch8.ijepa", "timm"),
                             ("someone--own-ijepa", "transformers")):  # fmt: skip
        cached = root / "hub" / f"models--{repository}"
        shutil.copytree(root / form, cached / "snapshots" / "abc")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("abc")
        facts = cached / "snapshots" / "abc" / "config.json"
        theirs = json.loads(facts.read_text())
        del theirs["njepa"]  # nobody else writes that
        facts.write_text(json.dumps(theirs))
    make_stripes(root / "train", 30)
    make_stripes(root / "test", 15, seed=1)
    return root


@pytest.fixture
def probed(world, monkeypatch, capsys):
    """Probe a subject; returns (status, JSON, stdout, stderr)."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(world / "hub"))

    def run(subject, which, *more):
        argv = ["probe", subject, "--train", "train", "--test", "test", "--cache", "cache",
                "--k", "5", "--device", "cpu", "--which", which, "--json", "out.json"]  # fmt: skip
        (world / "out.json").unlink(missing_ok=True)
        status = cli.main([*argv, *more])
        out, err = capsys.readouterr()
        found = json.loads((world / "out.json").read_text()) if status == 0 else {}
        return status, found, out, err

    return run


@pytest.mark.parametrize("subject", SUBJECTS)
def test_each_is_the_same_encoder(world, probed, subject):
    own = {which: open_subject(str(world / "run"), which).digest for which in BOTH}
    for which in BOTH:
        status, found, out, err = probed(subject, which, "--no-floors", "--kind", "knn")
        if which in SUBJECTS[subject] or SUBJECTS[subject] == ONE:
            # The one encoder of a source that does not say which is whatever is asked for.
            same = own[which] if SUBJECTS[subject] else own["target"]
            assert found["subject"]["digest"] == {which: same}
            origin = found["subject"]["origin"][which]
            assert out.startswith(f"{origin}; images of 48 px\n30 training and 15 test images")
            assert ("its only encoder" in origin) == (SUBJECTS[subject] == ONE)
        else:
            assert status == 2
            assert "has no context encoder: it holds one encoder, target; ask for that" in err


@pytest.mark.parametrize("subject", SUBJECTS)
def test_knn_and_linear_probe_of_both(probed, subject):
    status, found, out, err = probed(subject, "both", "--kind", "knn,linear")
    if SUBJECTS[subject] == BOTH:
        kinds = {"knn", "linear", "knn_context", "linear_context"}
        assert kinds < found.keys()
        assert found["subject"]["digest"].keys() == set(BOTH)
        assert found["knn"]["floors"].keys() == {"untrained", "pixels"}
        assert [line.split()[0] for line in out.splitlines() if line[:1] in "kl"] == [
            "knn", "linear", "knn_context", "linear_context"]  # fmt: skip
    else:
        assert (status, out) == (2, "")
        one = "does not say which it is, expected two" if not SUBJECTS[subject] else "ask for that"
        assert one in err
