"""Pooled features against the network run by hand, streaming against one batch, and the cache."""

import pytest
import torch

from njepa.data.sources import open_source
from njepa.evaluation import images as images_module
from njepa.evaluation.features import cached, extract, pooled_views
from njepa.evaluation.images import load_split, stream, subset
from njepa.evaluation.subject import open_subject
from njepa.models.attention import SDPA
from tests.support.subjects import make_run, make_stripes


@pytest.mark.parametrize("depth", [2, 5])
def test_views_are_the_means_of_the_blocks(tmp_path, depth):
    encoder = open_subject(str(make_run(tmp_path / "run", f"model.depth={depth}"))).encoder
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    x = encoder.patch_embed["proj"](images) + encoder.pos_embed
    sequences, layers = SDPA.sequences(3, 16, None), []
    for block in encoder.blocks:
        x = block(x, sequences)
        layers.append(encoder.norm(x).mean(1))
    views = extract(pooled_views(encoder), [images.permute(0, 3, 1, 2)], "cpu")
    torch.testing.assert_close(views["mean"], layers[-1])
    torch.testing.assert_close(views["last4"], torch.cat(layers[-4:], 1))
    assert not any(block._forward_hooks for block in encoder.blocks)


def test_a_stream_is_the_images_in_their_order(tmp_path, monkeypatch):
    index = open_source(make_stripes(tmp_path / "images", 23), tmp_path, progress=False)
    whole = load_split(index, 100, 32, 0, index.labels)
    monkeypatch.setattr(images_module, "_CHUNK", 10)
    batches = list(stream(index, subset(index, None, 0), 32, 4))
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 3]
    assert torch.equal(torch.cat(batches), whole.images)
    few = subset(index, 9, seed=2)
    assert torch.equal(torch.cat(list(stream(index, few, 32, 4))), whole.images[few])


def test_features_are_computed_once(tmp_path, caplog):
    calls = []

    def compute():
        calls.append(1)
        return {"mean": torch.full((2, 3), float(len(calls)))}

    first = cached(tmp_path, {"network": "a", "n": 2}, compute)
    assert torch.equal(cached(tmp_path, {"n": 2, "network": "a"}, compute)["mean"], first["mean"])
    assert len(calls) == 1
    assert cached(tmp_path, {"network": "b", "n": 2}, compute)["mean"][0, 0] == 2
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:20])
    assert cached(tmp_path, {"network": "a", "n": 2}, compute)["mean"][0, 0] == 3
    assert "is damaged and will be computed again" in caplog.text
    assert not list(tmp_path.glob("*.tmp"))


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = cached(tmp_path / "file", {}, lambda: {"mean": torch.ones(1, 1)})
    assert found["mean"].item() == 1
    assert "features are not kept in" in caplog.text
