"""The page: complete, closed to the outside, made from whatever is there."""

import base64
import hashlib
import html
import itertools
import json
import re
import shutil

import pytest
import torch

from njepa import cli, train
from njepa.data import eval_views
from njepa.data.errors import DecodeError
from njepa.report import write
from tests.support.jobs import TINY, make_images
from tests.support.report_runs import MARKUP, SCRIPT, lines, report_run, write_lines

PICTURES = ("Masks and noise", "Prediction errors", "Likeness to a patch", "Nearest neighbours")
PICTURES = tuple(f"<h3>{title}</h3>" for title in PICTURES)


def page(*arguments):
    """The page that the command writes."""
    arguments = list(map(str, arguments))
    assert cli.main(["report", *arguments]) == 0
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else None
    with open(out or f"{arguments[0]}/report.html", encoding="utf-8") as file:
        return file.read()


def missing(text):
    return [html.unescape(x) for x in re.findall(r"<li>(.*?)</li>", text.partition("Missing")[2])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with everything, its page, and its folder."""
    run = report_run(tmp_path_factory.mktemp("whole"))
    return run, page(run)


def test_everything_is_there(whole, capsys):
    run, text = whole
    assert missing(text) == []
    assert ">Healthy</span>" in text
    for word in (*PICTURES, "σ 0.5", "kNN", "41.2 %", "39.5 to 43.0", "optim.<wbr>lr"):
        assert word in text, word
    assert len(text) < 5_000_000
    page(run)
    assert capsys.readouterr().out.splitlines()[1] == "run: Healthy"


def test_the_page_is_closed(whole):
    _, text = whole
    assert not re.findall(r"https?:|//\w+\.\w", re.sub(r"base64,[\w+/=]+", "", text))
    assert not re.findall(r"<(?:link|iframe|object|base|form)\b", text)
    assert set(re.findall(r'\b(?:src|href)="([^"]{5})', text)) <= {"data:", "#curv", "#pict",
                                                                   "#scor", "#sett"}  # fmt: skip
    policy = html.unescape(re.search(r'Security-Policy" content="([^"]+)"', text)[1])
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for tag, found in re.findall(r"<(script|style)>(.*?)</\1>", text, re.S):
        digest = base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert 'style="' not in text  # which the policy forbids, too
    assert "Leon Sorokin" in text  # uPlot's licence asks for it


def test_names_are_escaped(whole, tmp_path):
    _, text = whole
    assert "alert(1)" in text
    for name in MARKUP:
        assert name not in text
        assert html.escape(name) in text
    assert text.count("<script") == 2
    assert html.escape(f"class0/{SCRIPT}") in text
    run = tmp_path / "<b>bold"
    run.mkdir()
    (run / "config.yaml").write_text("recipe: '</script><i>'\nx: {'<u>': '</title>'}\n")
    write_lines(run, [line | {"</script><s>": 1.0} for line in lines()])
    text = page(run)
    for raw in ("<b>bold", "<i>", "<u>", "<s>", "</title>'"):
        assert raw not in re.sub(r"<i class=.*?>", "", text)
    assert "&lt;b&gt;bold" in text


def copied(whole, folder):
    """The run alone, without its images: they stay where they were."""
    return shutil.copytree(whole[0], folder / "copy")


def test_a_checkpoint_that_is_gone(whole, tmp_path):
    run = copied(whole, tmp_path)
    shutil.rmtree(run / "checkpoints")
    text = page(run)
    assert "a complete checkpoint: no pictures of features" in missing(text)[0]
    assert [word for word in PICTURES if word in text] == [PICTURES[0]]


@pytest.mark.parametrize("name", ["target_encoder.safetensors", "shard-00000.safetensors"])
def test_damaged_weights(whole, tmp_path, name):
    run = copied(whole, tmp_path)
    file = run / "checkpoints" / "step-00000007" / name
    file.write_bytes(file.read_bytes()[:-100])
    text = page(run)
    assert len(missing(text)) == 1
    assert name in missing(text)[0]
    features = name.startswith("shard")
    assert [word in text for word in PICTURES] == [True, False, features, features]


def test_images_that_are_gone(tmp_path):
    run = report_run(tmp_path)
    for file in (tmp_path / "images").rglob("*.jpg"):
        file.unlink()
    text = page(run)
    assert "images" in missing(text)[0]
    assert not any(word in text for word in PICTURES)
    assert 'class="charts"' in text


def test_some_images_that_are_gone(whole, tmp_path, monkeypatch):
    calls, real = itertools.count(), eval_views.decode

    def decode(data):
        if next(calls) % 2:
            raise DecodeError("gone")
        return real(data)

    monkeypatch.setattr(eval_views, "decode", decode)
    told = missing(page(whole[0], "--out", tmp_path / "a.html"))
    assert "images that cannot be read and are grey: images/class" in told[0]


def test_other_images_than_those_of_the_training(tmp_path):
    run = report_run(tmp_path, digest="other")
    assert "data.path holds others now" in missing(page(run))[0]


def test_noise_is_named_block_by_block_only_where_blocks_differ(whole, tmp_path):
    assert 'class="chip' not in whole[1]
    text = page(report_run(tmp_path, noise={"sigma": [1.0, 0.5]}))
    chips = re.findall(r'<span class="chip b(\d)">σ (\S+)</span>', text)
    assert len(chips) == 6 * 4
    assert {sigma for _, sigma in chips} == {"1", "0.5"}
    assert [int(b) for b, _ in chips] == [0, 1, 2, 3] * 6


def test_numbers_alone(whole, tmp_path):
    text = page(whole[0], "--no-pictures", "--out", tmp_path / "a.html")
    assert not any(word in text for word in PICTURES)
    assert len(text) < 150_000


def test_several_runs(whole, tmp_path):
    run = copied(whole, tmp_path)
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace("seed: 0", "seed: 3"))
    write_lines(run, lines(std=0.01))
    text = page(whole[0], run, "--out", tmp_path / "two.html")
    assert ">Healthy</span>" in text
    assert ">Collapsed</span>" in text
    table = text.partition('id="differences"')[2].partition("</table>")[0]
    rows = re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>", table)
    assert rows == [("run.<wbr>seed", "0", "3")]
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert [series["label"] for series in data["charts"][0]["series"]] == ["run", "copy"]


def test_a_page_is_kept_small(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "LARGEST", len(whole[1]) - 1)
    text = page(whole[0], "--out", tmp_path / "a.html")
    assert len(text.encode()) < len(whole[1])
    assert "the page would exceed" in missing(text)[0]


def refused(capsys, *arguments):
    assert cli.main(["report", *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    return err


def test_a_full_disk(whole, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_atomically", full)
    told = refused(capsys, whole[0], "--out", tmp_path / "a.html")
    assert "a.html cannot be written: [Errno 28] No space left on device" in told


def test_what_cannot_be(whole, tmp_path, capsys):
    run, _ = whole
    assert "holds no run" in refused(capsys, tmp_path, "--out", tmp_path / "a.html")
    assert "does not exist; expected a run folder" in refused(capsys, tmp_path / "nowhere")
    assert "needs --out FILE" in refused(capsys, run, run)
    assert "given twice" in refused(capsys, run, run, "--out", tmp_path / "a.html")
    assert "--out" in refused(capsys, run, "--out", tmp_path / "no" / "a.html")
    assert "is a folder" in refused(capsys, run, "--out", tmp_path)


def test_a_run_draws_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    make_images(tmp_path / "images", 12)
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 4}')
    own = ["eval.report=true", "data.path=images", "run.dir=run", "data.cache_dir=cache"]
    assert train.main([*TINY, *own, "run.device=cpu"]) == 0
    told = "health: Too early to tell; curves and pictures: run/report.html"
    assert told in capsys.readouterr().out
    text = (tmp_path / "run" / "report.html").read_text()
    assert missing(text) == []
    for word in PICTURES:
        assert word in text


@pytest.mark.parametrize("what", ["render", "read_run", "write_atomically"])
def test_a_page_that_fails_fails_no_run(whole, tmp_path, monkeypatch, caplog, what):
    def broken(*_):
        raise MemoryError("no paper")

    monkeypatch.setattr(write, what, broken)
    assert write.report_of_run(whole[0], torch.device("cpu")) == ""
    assert "report.html was not written: MemoryError: no paper" in caplog.text


def test_the_last_score_is_a_point_of_the_curve(whole, tmp_path):
    run = copied(whole, tmp_path)
    score = json.loads((run / "summary.json").read_text())["knn_top1"]
    write_lines(run, [*lines(), {"step": 300, "knn_top1": 33.0}])
    text = page(run, "--no-pictures")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    (chart,) = (chart for chart in data["charts"] if chart["title"] == "kNN while training")
    assert (chart["x"], chart["series"][0]["y"]) == ([300, 580], [33.0, score])
