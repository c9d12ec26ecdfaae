"""``njepa probe`` from the command line: its numbers, its file, and what it refuses."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier

from njepa import cli
from njepa.data.eval_views import eval_images
from njepa.data.sources import open_source
from njepa.evaluation import finetune as finetune_module
from njepa.evaluation import images as images_module
from njepa.evaluation import probe as probe_module
from njepa.evaluation import tokens as tokens_module
from njepa.evaluation.subject import open_subject
from njepa.evaluation.task import open_task
from tests.support.subjects import make_run, make_stripes, probe_arguments, refusal


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("probe")
    make_run(root / "run")
    make_stripes(root / "train", 90)
    make_stripes(root / "test", 45, seed=1)
    return root


def arguments(root, *more, subject="run", **sides):
    return probe_arguments(root, subject, "--k", "5,20", *more, **sides)


def test_numbers_are_those_of_the_encoder(world, capsys):
    """kNN by scikit-learn on features that the encoder gives outside of the probe."""
    out = world / "out.json"
    kinds = ["--kind", "knn,linear,logistic", "--json", str(out)]
    assert cli.main(arguments(world, *kinds)) == 0
    result = json.loads(out.read_text())
    encoder = open_subject(str(world / "run")).encoder
    sides = []
    for side in ("train", "test"):
        index = open_source(world / side, world / "cache", progress=False)
        images = eval_images(index, torch.arange(index.n).numpy(), 32).permute(0, 2, 3, 1)
        sides.append((encoder(images).mean(1).detach().numpy(), index.labels))
    judge = KNeighborsClassifier(
        5, metric="cosine", weights=lambda d: torch.exp((1 - torch.tensor(d)) / 0.07).numpy()
    )
    expected = 100 * judge.fit(*sides[0]).score(*sides[1])
    assert result["knn"]["k"]["5"]["top1"] == pytest.approx(expected, abs=0.01)
    assert result["knn"]["top1"] == result["knn"]["k"]["20"]["top1"]
    for kind in ("knn", "linear", "logistic"):
        low, high = result[kind]["ci95"]
        assert low <= result[kind]["top1"] <= high
        # Nobody trained this encoder, so it is its own floor.
        assert result[kind]["floors"]["untrained"]["top1"] == result[kind]["top1"]
    for kind in ("linear", "logistic"):
        assert 0 < result[kind]["floors"]["pixels"]["top1"] < result[kind]["top1"]
    assert result["linear"]["top1"] > 60  # of three classes
    assert result["train"]["images"] == 90
    table = capsys.readouterr().out
    assert re.search(rf"knn +{result['knn']['top1']:.2f} \[", table)
    assert "untrained" in table
    assert "pixels" in table


def test_images_are_read_once(world, monkeypatch, capsys):
    assert cli.main(arguments(world, "--kind", "knn")) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(images_module, "eval_images", None)
    assert cli.main(arguments(world, "--kind", "knn")) == 0
    assert capsys.readouterr().out == first
    with pytest.raises(TypeError):  # other images, so the cache must not answer
        cli.main(arguments(world, "--kind", "knn", "--max-test", "40"))


def test_a_checkpoint_is_a_subject(world):
    by_run = open_subject(str(world / "run"))
    by_checkpoint = open_subject(str(world / "run" / "checkpoints" / "step-00000010"))
    assert by_run.digest == by_checkpoint.digest


def test_sources_that_cannot_be_probed(world, capsys):
    flat = world / "flat"
    flat.mkdir(exist_ok=True)
    shutil.copy(world / "train" / "class0" / "0000.jpg", flat)
    assert "--train" in (err := refusal(capsys, arguments(world, train="flat")))
    assert "needs labels of two classes or more, got 1 images with none" in err
    shutil.copytree(world / "train" / "class0", world / "one" / "class0", dirs_exist_ok=True)
    err = refusal(capsys, arguments(world, train="one"))
    assert "got one, 'class0', with all 30 images" in err
    assert "give a folder with a folder for each class" in err
    shutil.copytree(world / "train", world / "around" / "all", dirs_exist_ok=True)
    err = refusal(capsys, arguments(world, train="around"))
    assert f"give {world}/around/all, whose folders would be the classes" in err
    (world / "one.txt").write_text("train/class0/0000.jpg\ta\ntrain/class0/0003.jpg\ta\n")
    err = refusal(capsys, arguments(world, test="one.txt"))
    assert "--test" in err
    assert "got 2 images with none or all of one class" in err
    (world / "images.zip").touch()
    err = refusal(capsys, arguments(world, train="images.zip"))
    assert f"njepa convert {world}/images.zip OUT" in err
    for name in ("class1", "other"):
        shutil.copytree(world / "test" / "class1", world / "strange" / name, dirs_exist_ok=True)
    err = refusal(capsys, arguments(world, test="strange"))
    assert "must be among the 3 of --train" in err
    assert "got 1 others: other" in err
    assert "does not exist" in refusal(capsys, arguments(world, train="nowhere"))


def test_fewer_images_than_neighbours(world, capsys):
    err = refusal(capsys, arguments(world, "--k", "10,200", "--kind", "knn"))
    assert "k=200 needs as many training images, got 90; use --k with at most 90" in err
    err = refusal(capsys, arguments(world, "--kind", "linear,knn", "--max-train", "8"))
    assert "k=20 needs as many training images, got 8" in err  # before the linear probe


def test_nothing_to_choose_on(world, capsys):
    for i in range(3):
        folder = world / "three" / f"class{i}"
        shutil.copytree(world / "train" / f"class{i}", folder, dirs_exist_ok=True)
        for file in sorted(folder.iterdir())[1:]:
            file.unlink()
    err = refusal(capsys, arguments(world, "--kind", "linear", train="three"))
    assert "needs a class with two training images or more, got 3 images in 3 classes" in err


def test_options_that_make_no_sense(world, capsys):
    for more, message in (
        (("--kind", "knn,lniear"), "unknown probe 'lniear'; did you mean 'linear'?"),
        (("--shots", "1,x"), "--shots must be positive integers like 10,20, got '1,x'"),
        (("--k", "0"), "--k must be positive integers like 10,20, got '0'"),
        (("--max-test", "0"), "--max-test must be positive, got 0"),
        (("--seed", "-1"), "--seed must be 0 or more, got -1"),
        (("--json", str(world / "no" / "x.json")), "cannot be written in"),
        (("--json", str(world)), "is a folder"),
        (("--json", "/proc/x"), "cannot be written in /proc: "),
    ):
        assert message in refusal(capsys, arguments(world, *more))


def test_subjects_that_cannot_be_read(world, capsys):
    assert "holds no weights: expected a run" in refusal(capsys, arguments(world, subject="train"))
    weights = load_file(world / "run/checkpoints/step-00000010/target_encoder.safetensors")
    cases = {
        "cut": (None, "damaged: target_encoder.safetensors: it has 1000 bytes"),
        "other-width": (
            weights | {"norm.weight": torch.ones(48)},
            "norm.weight: got [48], expected [32]",
        ),
        "other-patch": (
            weights | {"patch_embed.proj.weight": torch.ones(32, 3, 4, 4)},
            "got 4 x 4 patches of 4 pixels, so images of 16, expected 32",
        ),
        "missing": (
            {k: v for k, v in weights.items() if k != "norm.bias"} | {"head.bias": torch.ones(3)},
            "missing: norm.bias",
        ),
    }
    for name, (state, message) in cases.items():
        run = make_run(world / name, target=state)
        if state is None:
            file = run / "checkpoints/step-00000010/target_encoder.safetensors"
            file.write_bytes(file.read_bytes()[:1000])
        assert message in refusal(capsys, arguments(world, subject=name)), name
    shutil.rmtree(world / "missing" / "checkpoints" / "step-00000010")
    assert "has no complete checkpoint yet" in refusal(capsys, arguments(world, subject="missing"))


def test_a_damaged_configuration(world, capsys):
    """It says how the untrained network was drawn."""
    (make_run(world / "no-yaml") / "config.yaml").write_text("model: [")
    err = refusal(capsys, arguments(world, "--kind", "knn", subject="no-yaml"))
    assert "no-yaml/config.yaml is not YAML" in err


def test_a_damaged_image_is_named_and_counts_as_an_error(world, capsys, caplog):
    shutil.copytree(world / "test", world / "damaged", dirs_exist_ok=True)
    file = world / "damaged" / "class0" / "0000.jpg"
    file.write_bytes(file.read_bytes()[:400])
    assert cli.main(arguments(world, "--kind", "knn", "--no-floors", test="damaged")) == 0
    assert "class0/0000.jpg" in caplog.text


@pytest.mark.slow
def test_every_kind_gives_a_number(world, monkeypatch, capsys):
    monkeypatch.setattr(probe_module.dense, "TRAIN", 40)
    monkeypatch.setattr(probe_module.dense, "TEST", 20)
    monkeypatch.setattr(probe_module.dense, "CLIPS", 4)
    monkeypatch.setattr(finetune_module.os, "sched_getaffinity", lambda _: {0})
    out = world / "all.json"
    more = ["--kind", "lowshot,attentive,finetune,dense", "--shots", "1,3", "--json", str(out)]
    assert cli.main(arguments(world, *more, "--finetune-epochs", "1", "--batch-size", "30")) == 0
    result = json.loads(out.read_text())
    floors = {
        "lowshot": {"untrained", "pixels"}, "attentive": {"untrained"}, "finetune": {"untrained"},
        "segmentation": {"untrained", "pixels"}, "propagation": {"untrained", "pixels", "still"},
    }  # fmt: skip
    table = capsys.readouterr().out
    for kind, names in floors.items():
        assert set(result[kind]["floors"]) == names
        assert result[kind]["floors"]["untrained"]["top1"] == result[kind]["top1"]
        assert re.search(rf"^{kind} +{result[kind]['top1']:.2f} \[", table, re.MULTILINE)
    assert set(result["lowshot"]["shots"]) == {"1", "3"}
    assert result["lowshot"]["top1"] == result["lowshot"]["shots"]["3"]["top1"]


def test_the_main_view_is_the_mean_of_the_last_layer(world, tmp_path):
    """Computed, and read from the cache again."""
    subject = open_subject(str(world / "run"))
    task = open_task(world / "train", world / "test", world / "cache", (None, None), 0)
    settings = probe_module.Settings(cache=tmp_path)
    images = eval_images(task.test.index, task.test.ids, 32).permute(0, 2, 3, 1)
    expected = subject.encoder(images).mean(1)
    for _ in range(2):
        views = probe_module.pooled_views(subject.encoder)
        found = probe_module.features_of(views, subject.digest, 32, task, settings)
        torch.testing.assert_close(found.main[1], expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_the_same_where_they_are_not_kept(world, monkeypatch):
    subject = open_subject(str(world / "run"))
    task = open_task(world / "train", world / "test", world / "cache", (None, None), 0)
    numbers = torch.tensor([44, 3, 17])
    kept = tokens_module.TokenStore(subject, task.test, 16, "cpu")(numbers)
    monkeypatch.setattr(tokens_module, "HELD", 0)
    again = tokens_module.TokenStore(subject, task.test, 16, "cpu")(numbers)
    torch.testing.assert_close(kept, again, rtol=1e-3, atol=1e-3)
    images = eval_images(task.test.index, numbers.numpy(), 32).permute(0, 2, 3, 1)
    torch.testing.assert_close(again, subject.encoder(images))


def test_dense_needs_no_source_and_others_do(world, capsys):
    argv = ["probe", str(world / "run"), "--kind", "knn,dense"]
    assert "--kind knn needs --train SOURCE, got none" in refusal(capsys, argv)


def test_a_class_with_fewer_images_than_shots(world, capsys):
    err = refusal(capsys, arguments(world, "--kind", "lowshot", "--shots", "5,40"))
    assert "class 'class0' has 30; use --shots with at most 30" in err
