"""Who sees what when: every sample once per epoch for any sizes, the same for every number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_dist.data import augment
from ddpm_dist.data.order import SampleOrder, permutation, plan_batches
from ddpm_dist.errors import UserError


@given(samples=st.integers(1, 50), world=st.integers(1, 4), per_rank=st.integers(1, 8), steps=st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_every_sample_once_per_epoch(samples, world, per_rank, steps):
    plan = plan_batches(world * per_rank, None, world)
    order = SampleOrder(samples, seed=1)
    seen = []
    for step in range(steps):
        for rank in range(world):
            seen.extend(order.locate(step * plan.global_batch + plan.slots(rank, 0))[1].tolist())
    full, rest = divmod(len(seen), samples)
    for epoch in range(full):
        assert sorted(seen[epoch * samples : (epoch + 1) * samples]) == list(range(samples))
    assert len(set(seen[full * samples :])) == rest


@given(
    samples=st.integers(1, 40), batch=st.sampled_from([12, 24, 60]), world=st.sampled_from([1, 2, 3, 4, 6, 12]),
    step=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_the_same_for_every_world_size_and_micro_batch(samples, batch, world, step):
    whole = SampleOrder(samples, 3).locate(step * batch + np.arange(batch))
    for micro in (n for n in range(1, batch // world + 1) if batch // world % n == 0):
        plan = plan_batches(batch, micro, world)
        parts = [plan.slots(rank, m) for rank in range(world) for m in range(plan.accumulation)]
        assert np.array_equal(np.concatenate(parts), np.arange(batch))
        epochs, ids = zip(*(SampleOrder(samples, 3).locate(step * batch + part) for part in parts), strict=True)
        assert np.array_equal(np.concatenate(ids), whole[1]) and np.array_equal(np.concatenate(epochs), whole[0])


def test_permutations_differ_by_epoch_and_seed_and_stay_the_same_for_good():
    assert permutation(0, 0, 10).tolist() == PINNED  # a change of this list would change every run that is resumed
    assert permutation(0, 0, 100).tolist() != permutation(0, 1, 100).tolist() != permutation(1, 1, 100).tolist()


PINNED = [5, 9, 8, 4, 2, 7, 3, 0, 1, 6]


@pytest.mark.parametrize(
    ("batch", "micro", "world", "words"),
    [
        (100, None, 3, ["not divisible by 3", "99 or 102", "1, 2, 4, 5 or 10"]),
        (4, None, 8, ["8 ranks", "at most 4"]),
        (24, 5, 2, ["micro_batch=5", "1, 2, 3, 4, 6 or 12"]),
    ],
)
def test_impossible_batches_list_the_choices(batch, micro, world, words):
    with pytest.raises(UserError) as error:
        plan_batches(batch, micro, world)
    for word in words:
        assert word in str(error.value)


def test_random_resized_windows_stay_inside_and_cover_the_asked_area():
    heights, widths = np.full(5000, 60), np.full(5000, 80)
    uniform = augment.draws(0, np.zeros(5000, np.int64), np.arange(5000), augment.DRAWS)
    top, left, h, w = augment.windows("random_resized", [0.8, 1.0], heights, widths, uniform).T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 60).all() and (left + w <= 80).all()
    share = h * w / 4800
    assert share.min() > 0.78 and share.max() <= 1.0
    assert (w / h).min() > 0.74 and (w / h).max() < 1.36
    assert len({tuple(row) for row in zip(top, left, h, w, strict=True)}) > 1000


def test_augmentation_draws_depend_on_epoch_and_sample_only():
    ids = np.array([5, 9, 1])
    a = augment.draws(0, np.array([2, 2, 2]), ids, augment.DRAWS)
    b = augment.draws(0, np.array([2]), np.array([9]), augment.DRAWS)
    assert np.array_equal(a[1], b[0])
    assert not np.array_equal(a, augment.draws(0, np.array([3, 3, 3]), ids, augment.DRAWS))


def test_center_windows():
    got = augment.windows("center", [0.8, 1.0], np.array([10, 7]), np.array([6, 20]), None)
    assert got.tolist() == [[2, 0, 6, 6], [0, 6, 7, 7]]
