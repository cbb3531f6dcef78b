"""Mixing by weight and balanced classes: exact shares, every sample once per epoch of its set, a function of the position alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import shard_folders
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_dist.data.block_order import BlockOrder
from ddpm_dist.data.choose_order import kind_of, make_order, shard_ends
from ddpm_dist.data.mixed_order import PERIOD, ClassOrder, Dealer, MixedOrder, set_seed, shares
from ddpm_dist.data.order import SampleOrder, divisors, plan_batches
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError

packed = shard_folders.packed  # fixture: 25 samples in 3 shards, 10 classes


def once_per_epoch(epochs, ids, samples):
    """Whole epochs hold every sample once, the last ones nothing twice."""
    assert len(set(zip(epochs.tolist(), ids.tolist(), strict=True))) == len(ids)
    counts = np.bincount(epochs)
    assert (counts <= samples).all()
    return int((counts == samples).sum())


@given(
    weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=4), seed=st.integers(0, 1000), data=st.data(),
    world=st.integers(1, 3), per_rank=st.integers(1, 8),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_mixing_is_exact_on_any_number_of_ranks(weights, seed, data, world, per_rank):
    plan = plan_batches(world * per_rank, None, world)
    batch, lanes = plan.global_batch, data.draw(st.sampled_from(divisors(world * per_rank)))
    sizes = [data.draw(st.integers(1, 50)) for _ in weights]
    blocks = [data.draw(st.booleans()) for _ in weights]

    def fresh():
        own = [
            BlockOrder(np.arange(1, size + 1), d, 3, lanes, lanes) if block else SampleOrder(size, d)
            for d, (size, block) in enumerate(zip(sizes, blocks, strict=True))
        ]
        return MixedOrder(own, sizes, weights, seed, lanes, batch)

    steps = -(-lanes * PERIOD // batch) + 1
    epochs, ids = fresh().locate(np.arange(steps * batch))
    counts, edges = shares(weights), np.cumsum([0, *sizes])
    sets, lane = np.searchsorted(edges, ids, side="right") - 1, np.arange(len(ids)) % batch // (batch // lanes)
    for each in range(lanes):
        assert np.array_equal(np.bincount(sets[lane == each][:PERIOD], minlength=len(sizes)), counts)
    for part, size in enumerate(sizes):
        mine = sets == part
        last = [epochs[mine & (lane == each)] for each in range(lanes)]
        assert all((np.diff(own) >= 0).all() for own in last)
        # An epoch that every lane has left is complete.
        assert once_per_epoch(epochs[mine], ids[mine] - edges[part], size) >= min(own[-1] for own in last)
    start = data.draw(st.integers(0, steps - 3))
    ranks = [fresh() for _ in range(world)]
    for step in range(start, start + 3):
        got = [order.locate(step * batch + plan.slots(rank, 0)) for rank, order in enumerate(ranks)]
        assert np.array_equal(np.concatenate([each[1] for each in got]), ids[step * batch : (step + 1) * batch])
        assert np.array_equal(np.concatenate([each[0] for each in got]), epochs[step * batch : (step + 1) * batch])


def test_each_period_has_its_exact_share_in_another_order():
    dealer = Dealer(np.array([5, 3, 2]), 0, 21)
    parts, places = dealer.deal(np.zeros(1000, dtype=np.int64), np.arange(1000))
    periods = parts.reshape(100, 10)
    assert all(np.bincount(period).tolist() == [5, 3, 2] for period in periods)
    assert len({tuple(period) for period in periods}) > 90
    for part, count in enumerate([500, 300, 200]):
        assert np.array_equal(places[parts == part], np.arange(count))  # without gaps, ascending
    assert [dealer.begun(0, n).tolist() for n in (0, 7, 40)] == [
        np.bincount(parts[:n], minlength=3).tolist() for n in (0, 7, 40)
    ]


def test_shares_are_rounded_to_a_thousandth():
    assert shares([1, 1, 1]).tolist() == [334, 333, 333]
    assert shares([0.7, 0.3]).tolist() == [700, 300] and shares([3e300, 1e300]).tolist() == [750, 250]
    assert shares([1, 0.002]).sum() == PERIOD and shares([5]).tolist() == [1000]
    for weights, said in (
        ([1, 0.0001], r"data.mix\[1\]: weight 0.0001 .* less than one image in 1,000"), ([1, 0], "not a positive"),
        ([-1, 2], "not a positive"), ([float("nan")], "not a positive"), ([float("inf"), 1], "not a positive"), ([], "empty"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            shares(weights)


def test_the_same_for_good():
    """A change of these numbers would change every run that is resumed."""
    order = MixedOrder([SampleOrder(4, 0), BlockOrder(np.array([3, 6]), 1, 1)], [4, 6], [1, 2], 5)
    epochs, ids = order.locate(np.arange(3000, 3012))
    assert (epochs.tolist(), ids.tolist()) == PINNED_MIX
    epochs, ids = ClassOrder(np.array([0, 2, 0, 2, 2, 0, 3]), 5).locate(np.arange(2040, 2052))
    assert (epochs.tolist(), ids.tolist()) == PINNED_CLASSES
    assert set_seed(0, 0) == PINNED_SEED


PINNED_MIX = (
    [249, 250, 333, 250, 333, 333, 334, 334, 334, 250, 334, 250],
    [2, 0, 6, 2, 4, 5, 5, 4, 6, 3, 7, 1],
)
PINNED_CLASSES = (
    [226, 226, 680, 227, 227, 681, 682, 227, 227, 683, 227, 227],
    [3, 4, 6, 0, 3, 6, 6, 1, 4, 6, 2, 5],
)
PINNED_SEED = 8939142590533415437


def test_sets_do_not_share_their_order():
    assert len({set_seed(seed, number) for seed in range(20) for number in range(20)}) == 400


def test_a_mix_with_lanes_keeps_ranks_in_their_own_shards():
    own = [BlockOrder(np.arange(1, 129) * 10, set_seed(0, d), 4, 4, 4) for d in range(2)]
    order = MixedOrder(own, [1280, 1280], [3, 1], 0, 4, 32, shards=[128, 128])
    touched = []
    for lane in range(4):
        slots = lane * 8 + np.arange(8)
        ids = order.locate((np.arange(50)[:, None] * 32 + slots).reshape(-1))[1]
        assert abs((ids < 1280).mean() - 0.75) < 0.1
        touched.append(set((ids // 10).tolist()))
        ahead = order.shards_ahead(0, slots, 40).tolist()
        assert len(set(ahead)) == 40 and set(ahead[:4]) & touched[-1] and len(set(ahead) & touched[-1]) > 30
    assert sum(map(len, touched)) - len(set().union(*touched)) <= 4 * 2 * 4


def test_shards_ahead_of_a_mix_follow_the_weights():
    own = [BlockOrder(np.arange(1, 101) * 10, d, 5) for d in range(2)]
    order = MixedOrder([*own, SampleOrder(6, 0)], [1000, 1000, 6], [9, 1, 1], 3, shards=[100, 100, 2])
    found = order.shards_ahead(700, np.array([0]), 60)
    ids = order.locate(700 + np.arange(5000))[1]
    needed = list(dict.fromkeys(np.searchsorted(np.arange(1, 203) * 10, ids, side="right").tolist()))
    assert set(found[:2]) <= {200, 201, *needed[:12]} and {200, 201} <= set(found.tolist())
    assert (found < 100).sum() > 40 and set(needed[:25]) <= set(found.tolist())
    with pytest.raises(ValueError, match="number of shards"):
        MixedOrder(own, [1000, 1000], [1, 1], 3).shards_ahead(0, np.array([0]), 1)


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=50), world=st.integers(1, 3), per_rank=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_classes_are_shown_equally_often(labels, world, per_rank):
    labels = np.array(labels)
    plan = plan_batches(world * per_rank, None, world)
    order = ClassOrder(labels, 3)
    classes, counts = np.unique(labels, return_counts=True)
    period = len(classes) * -(-1024 // len(classes))
    epochs, ids = order.locate(np.arange(2 * period))
    for begin in (0, period):
        assert set(np.bincount(labels[ids[begin : begin + period]])[classes].tolist()) == {period // len(classes)}
    for number, count in zip(classes, counts, strict=True):
        mine = labels[ids] == number
        assert once_per_epoch(epochs[mine], ids[mine], count) >= 2 * period // len(classes) // count
        assert (np.diff(epochs[mine]) >= 0).all()
    ranks = [ClassOrder(labels, 3) for _ in range(world)]
    for step in (40, 41, 7):  # any order of asking
        got = [each.locate(step * plan.global_batch + plan.slots(rank, 0)) for rank, each in enumerate(ranks)]
        here = slice(step * plan.global_batch, (step + 1) * plan.global_batch)
        assert np.array_equal(np.concatenate([each[1] for each in got]), ids[here])
        assert np.array_equal(np.concatenate([each[0] for each in got]), epochs[here])


def test_empty_classes_are_left_out_with_a_warning():
    order = ClassOrder(np.array([1, 1, 3]), 0, ["a", "b", "c", "d", "e"])
    assert order.warnings == [
        "data.balance=class: no sample has class 0 (a), 2 (c), 4 (e); left out, the others are shown equally often"
    ]
    assert abs((order.locate(np.arange(1024))[1] == 2).sum() - 512) == 0
    assert ClassOrder(np.array([0, 1]), 0, ["a", "b"]).warnings == []
    with pytest.raises(UserError, match="sample 1 has no label"):
        ClassOrder(np.array([0, -1]), 0)


def data(**changes):
    values = {"order": "auto", "full_shuffle": 20, "block_shards": 2, "lanes": 1, "mix": None, "balance": "none"}
    return SimpleNamespace(**values | changes)


def test_the_order_is_chosen_by_size_and_settings(packed):
    index = Index.load(packed)
    positions = np.arange(60)
    assert shard_ends(index).tolist() == [10, 20, 25]
    full, blocks = SampleOrder(25, 3).locate(positions), BlockOrder(shard_ends(index), 3, 2, 2, 4).locate(positions)
    for settings_, expected in (
        (data(full_shuffle=25), full), (data(order="full"), full), (data(order="full", lanes=2), full),
        (data(lanes=2), blocks), (data(order="blocks", full_shuffle=25, lanes=2), blocks),
    ):  # fmt: skip
        found = make_order(index, settings_, 3, 4).locate(positions)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert kind_of(20_000_000, data(full_shuffle=20_000_000)) == "full"
    assert kind_of(20_000_001, data(full_shuffle=20_000_000)) == "blocks"


def test_mix_and_balance_of_real_indexes(packed):
    index = Index.load(packed)
    both = SimpleNamespace(parts=[index, index])
    mix = [SimpleNamespace(shards="a", weight=1.0), SimpleNamespace(shards="b", weight=3.0)]
    order = make_order(both, data(mix=mix, lanes=2), 3, 4)
    ids = order.locate(np.arange(2000))[1]
    assert (ids < 25).sum() == 500 and set(ids.tolist()) == set(range(50))
    assert set(order.shards_ahead(0, np.arange(4), 6).tolist()) == set(range(6))
    own = [BlockOrder(shard_ends(index), set_seed(3, d), 2, 2, 2) for d in range(2)]
    assert np.array_equal(MixedOrder(own, [25, 25], [1, 3], 3, 2, 4).locate(np.arange(2000))[1], ids)
    balanced = make_order(index, data(order="full", balance="class"), 3, 4)
    assert balanced.warnings == []
    ids = balanced.locate(np.arange(1030))[1]
    assert np.bincount(index.samples["label"][ids]).tolist() == [103] * 10


def test_settings_that_do_not_go_together(packed):
    index = Index.load(packed)
    mix = [SimpleNamespace(shards="a", weight=1.0), SimpleNamespace(shards="b/c", weight=0.0001)]
    both = SimpleNamespace(parts=[index, index])
    unlabelled = SimpleNamespace(classes=None, shards=index.shards)
    for what, settings_, said in (
        (index, data(lanes=3), "data.lanes=3 does not divide"), (index, data(lanes=3, order="full"), "does not divide"),
        (index, data(balance="class"), "raise data.full_shuffle"), (unlabelled, data(balance="class"), "needs labels"),
        (both, data(mix=mix, balance="class"), "does not go with data.mix"), (both, data(mix=mix), "data.mix: b/c: weight"),
        (SimpleNamespace(parts=[index]), data(mix=mix), "names 2 data sets, but 1 were opened"),
        (both, data(mix=mix, lanes=3), "data.lanes=3 does not divide train.global_batch=4"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            make_order(what, settings_, 0, 4)
