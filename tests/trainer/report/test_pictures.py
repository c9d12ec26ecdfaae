"""What the pictures show is what the training sees and what the features say."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from njepa.data.loader import build_loader
from njepa.data.sources import open_source
from njepa.draws.masks import MaskSampler
from njepa.draws.order import SampleOrder
from njepa.objectives import prediction_loss
from njepa.report.drawing import VIRIDIS, coloured
from njepa.report.figures import mask_figures, neighbour_rows
from njepa.report.images import Gallery, some_ids, step_views
from njepa.report.maps import KEPT, nearest, packed_tokens, pca_colours
from njepa.report.network import open_network, prediction_errors
from njepa.report.page import render, show
from njepa.report.pictures import take_pictures
from njepa.report.record import read_run
from tests.support.report_runs import report_run

CPU = torch.device("cpu")


def opened(folder, method="njepa", **sections):
    run = read_run(report_run(folder, method, **sections))
    assert run.config is not None
    return run, run.config, open_source(run.config.data.path, run.config.data.cache_dir)


@pytest.mark.parametrize(
    "sections",
    [
        {"noise": {"sigma": [1.0, 0.5]}},
        {"mask": {"ragged": True, "min_keep": 2}},
        {"mask": {"compat": "upstream", "min_keep": 2}, "noise": {"draw": "shared"}},
    ],
    ids=["blocks", "ragged", "upstream"],
)
def test_a_step_is_seen_as_the_loader_gives_it(tmp_path, sections):
    run, config, index = opened(tmp_path, **sections)
    views = step_views(run, config, index, 3)
    config = config.model_copy(update={"data": config.data.model_copy(update={"workers": 0})})
    order = SampleOrder(index.n, 8, 1, 1, 0, config.run.seed)
    masks = MaskSampler(config.mask, config.grid, config.run.seed, 8)
    loader = build_loader(config, index, order, masks, CPU, 7, 8)
    batch = next(loader)
    loader.close()
    assert views.step == 7
    assert torch.equal(views.images, batch.images[:3])
    assert torch.equal(views.masks.target_idx, batch.masks.target_idx[:3])
    width = views.masks.context_idx.shape[1]
    assert torch.equal(views.masks.context_idx, batch.masks.context_idx[:3, :width])
    assert torch.equal(views.noise.sigma, batch.noise.sigma[:3])
    assert views.noise.key._replace(sample_ids=None) == batch.noise.key._replace(sample_ids=None)
    assert torch.equal(views.noise.key.sample_ids, batch.noise.key.sample_ids[:3])
    if config.mask.ragged:
        assert views.masks.context_lengths.counts == batch.masks.context_lengths.counts[:3]


@pytest.mark.parametrize("method", ["ijepa", "njepa", "ncjepa"])
def test_errors_are_the_loss_by_patch(tmp_path, method):
    run, config, index = opened(tmp_path, method)
    network, views = open_network(run, config, CPU), step_views(run, config, index, 4)
    assert network.jepa is not None
    errors = prediction_errors(network.jepa, network, views)
    with torch.no_grad():
        output = network.jepa(views.images, views.masks, views.noise)
        h = network.target(views.images)
    terms = prediction_loss(config.noise, output, h, views.masks).metrics
    times = torch.zeros(4, 36).scatter_add_(
        1, views.masks.target_idx.flatten(1), torch.ones(4, views.masks.target_idx[0].numel())
    )
    names = {"clean": "loss_clean", "noised": "loss_noise"}
    assert set(errors.maps) == {b for b, name in names.items() if name in terms}
    for branch, one in errors.maps.items():
        assert torch.equal(one.isnan(), times == 0)
        mean = (one.nan_to_num() * times).sum() / times.sum()
        torch.testing.assert_close(mean, terms[names[branch]], rtol=1e-4, atol=1e-6)
    assert 0 < errors.constant < 1


def test_masks_are_drawn_where_they_are(tmp_path):
    views = step_views(*opened(tmp_path, mask={"ragged": True, "min_keep": 2}), 6)
    for i, figure in enumerate(mask_figures(views)):
        count = views.masks.context_lengths.counts[i]
        context = set(views.masks.context_idx[i, :count].tolist())
        assert {6 * y + x for x, y in figure.hidden} == set(range(36)) - context
        assert figure.context == count
        for block, patches in zip(figure.blocks, views.masks.target_idx[i].tolist(), strict=True):
            rows, columns = range(block.y, block.y + block.height), range(block.width)
            assert [6 * y + block.x + x for y in rows for x in columns] == patches
            assert block.sigma == "0.5"


def test_colours_follow_the_components():
    x = torch.zeros(2, 8, 5)
    x[0, :, 3], x[1, :, 3] = 4.0, -4.0  # one direction holds everything
    found = pca_colours(x)
    assert found.explained[0] == pytest.approx(1.0)
    assert found.rgb[0, :, 0].unique().tolist() == [255]
    assert found.rgb[1, :, 0].unique().tolist() == [0]


def test_equal_features_are_grey():
    found = pca_colours(torch.ones(2, 8, 5))
    assert found.rgb.unique().tolist() == [128]


@pytest.mark.parametrize("width", [5, KEPT + 40])
def test_packed_features_keep_cosines(width):
    torch.manual_seed(0)
    low = torch.randn(4, 36, 4) @ torch.randn(4, width) + 0.02 * torch.randn(4, 36, width)
    packed = packed_tokens(low)
    assert packed.dimensions == min(width, KEPT)
    assert packed.energy > 0.999
    unit = F.normalize(low.flatten(0, 1), dim=1)
    assert packed.likeness == pytest.approx(float((unit @ unit.T).mean()), abs=1e-5)
    rows = np.frombuffer(base64.b64decode(packed.data), np.int8).reshape(144, packed.dimensions)
    got = F.normalize(torch.tensor(rows).float(), dim=1)
    assert (got @ got.T - unit @ unit.T).abs().max() < 0.02


def test_nearest():
    bank = torch.eye(4)
    cosine, places = nearest(torch.tensor([[0.0, 3.0, 4.0, 0.0]]), bank, 2)
    assert places.tolist() == [[2, 1]]
    torch.testing.assert_close(cosine, torch.tensor([[0.8, 0.6]]))
    assert nearest(bank, bank, 9)[0].shape == (4, 4)


def test_images_shown_are_of_different_classes(tmp_path):
    _, _, index = opened(tmp_path)
    ids = some_ids(index, 5, 0)
    assert len(set(ids.tolist())) == 5
    assert set(index.labels[ids[:2]]) == {0, 1}
    assert len(some_ids(index, 500, 0)) == 40


def test_colours_of_numbers():
    found = coloured(np.array([0.0, 0.5, 1.0, 9.0, np.nan], np.float32), 0, 1)
    assert found[:4, :3].tolist() == [list(VIRIDIS[i]) for i in (0, 4, 8, 8)]
    assert found[:, 3].tolist() == [255, 255, 255, 255, 0]


def test_the_picture_of_decode_is_shown_where_it_is(tmp_path):
    run = read_run(report_run(tmp_path))
    run.config = None  # the picture needs neither settings nor images
    assert take_pictures(run, CPU).decoded is None
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels // 8).save(run.path / "decode.png")
    found = take_pictures(run, CPU)
    kind, encoded = found.decoded.split(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        assert image.size == (400, 300)
        assert abs(np.asarray(image).mean() - (pixels // 8).mean()) < 1
    page = render([show(run, found)])
    assert found.decoded in page
    assert "What the predictor expects" in page
    (run.path / "decode.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    found = take_pictures(run, CPU)
    assert found.decoded is None
    assert any(line.startswith("decode.png: ") for line in found.missing)
    assert "What the predictor expects" not in render([show(run, found)])


@pytest.mark.parametrize(
    ("cosine", "places"), [(-0.2, 3), (0.7, 3), (0.981, 3), (0.993, 4), (0.99985, 5), (1.0, 5)]
)
def test_cosines_near_one_get_more_digits(cosine, places):
    """As many as tell the neighbours of a query apart, the least similar of which this is."""
    queries = Gallery(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ["a"], [None])
    bank = Gallery(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), ["b", "c"], [None, None])
    features = torch.tensor([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]])
    (row,) = neighbour_rows(queries, features[:1], bank, features, 2)
    assert [one.name for one in row.neighbours] == ["b", "c"]
    assert row.places == places
