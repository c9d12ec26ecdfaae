"""The order of samples: complete epochs, equal steps, the same for every number of ranks."""

import numpy as np
import pytest

from njepa.config import ConfigError
from njepa.draws.order import SampleOrder


def test_an_epoch_visits_every_sample_at_most_once_and_epochs_differ():
    order = SampleOrder(n=103, micro_batch=5, accumulation=2, world=1, rank=0, seed=3)
    assert order.steps_per_epoch == 10
    epochs = [
        np.concatenate([order.at(m).ids for m in range(20 * e, 20 * (e + 1))]) for e in range(3)
    ]
    for seen in epochs:
        assert len(np.unique(seen)) == 100
        assert seen.min() >= 0
        assert seen.max() < 103
    assert not np.array_equal(epochs[0], epochs[1])
    left_out = [set(range(103)) - set(seen.tolist()) for seen in epochs]
    assert left_out[0] != left_out[1]  # nobody is left out for good


def test_place_of_a_micro_step():
    order = SampleOrder(n=40, micro_batch=4, accumulation=2, world=1, rank=0, seed=0)
    plans = [order.at(m) for m in range(12)]
    assert [p.step for p in plans] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [p.epoch for p in plans] == [0] * 10 + [1] * 2
    assert [p.micro_step for p in plans] == list(range(12))
    assert order.at(7).ids.tolist() == plans[7].ids.tolist()  # any order of asking
    other = SampleOrder(n=40, micro_batch=4, accumulation=2, world=1, rank=0, seed=1)
    assert other.at(0).ids.tolist() != plans[0].ids.tolist()


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (4, 1), (2, 2), (1, 4)])
def test_ranks_and_accumulation_cut_the_same_global_batch(world, accumulation):
    one = SampleOrder(n=50, micro_batch=8, accumulation=1, world=1, rank=0, seed=7)
    micro = 8 // world // accumulation
    ranks = [SampleOrder(50, micro, accumulation, world, r, 7) for r in range(world)]
    assert {r.steps_per_epoch for r in ranks} == {one.steps_per_epoch}
    for step in range(2 * one.steps_per_epoch):
        parts = []
        for j in range(accumulation):
            plans = [r.at(step * accumulation + j) for r in ranks]
            joined = np.concatenate([p.ids for p in plans])
            assert all(np.array_equal(p.global_ids, joined) for p in plans)
            parts.append(joined)
        assert np.array_equal(np.concatenate(parts), one.at(step).ids)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_rank_has_equally_many_full_micro_batches(world, accumulation):
    """However many images are left over: a rank with one more would wait for the others."""
    step = 2 * accumulation * world
    for n in range(step, 2 * step + 3):
        ranks = [SampleOrder(n, 2, accumulation, world, r, 1) for r in range(world)]
        assert {r.steps_per_epoch for r in ranks} == {n // step}
        for micro_step in range(2 * accumulation * (n // step)):  # two epochs
            plans = [r.at(micro_step) for r in ranks]
            assert {(p.step, p.epoch, len(p.ids)) for p in plans} == {
                (plans[0].step, plans[0].epoch, 2)
            }
            assert len(set(np.concatenate([p.ids for p in plans]).tolist())) == 2 * world


def test_replacements_do_not_depend_on_the_ranks():
    one = SampleOrder(n=20, micro_batch=8, accumulation=1, world=1, rank=0, seed=1)
    two = [SampleOrder(20, 4, 1, 2, r, 1) for r in range(2)]
    for slot in range(8):
        expected = list(one.replacements(1, slot))
        assert expected == list(two[slot // 4].replacements(1, slot % 4))
        assert one.at(1).ids[slot] not in expected
        assert len(expected) == len(set(expected)) == 8
    assert list(one.replacements(1, 0))[:7] == one.at(1).ids[1:].tolist()


def test_numbers_that_cannot_work():
    with pytest.raises(ConfigError, match=r"31 images, but one step needs 32 .*8 x .*2 x 2 ranks"):
        SampleOrder(n=31, micro_batch=8, accumulation=2, world=2, rank=0, seed=0)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        SampleOrder(n=31, micro_batch=8, accumulation=1, world=2, rank=2, seed=0)
    with pytest.raises(ValueError, match="micro_batch must be at least 1, got 0"):
        SampleOrder(n=31, micro_batch=0, accumulation=1, world=1, rank=0, seed=0)
    with pytest.raises(ValueError, match="micro_step"):
        SampleOrder(n=31, micro_batch=1, accumulation=1, world=1, rank=0, seed=0).at(-1)
