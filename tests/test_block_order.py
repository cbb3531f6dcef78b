"""Blocks of shards: every sample once per epoch for any sizes and lanes, the same for every number of ranks, each lane in its own shards."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_dist import philox
from ddpm_dist.data import block_order
from ddpm_dist.data.block_order import BlockOrder, shuffled
from ddpm_dist.data.order import SampleOrder, divisors, plan_batches
from ddpm_dist.errors import UserError


@st.composite
def orders(draw):
    """(shard ends, K, lanes, global batch, ranks): 1 to 50 samples, 1 to 3 ranks with 1 to 8 images each."""
    samples = draw(st.integers(1, 50))
    cuts = draw(st.sets(st.integers(1, max(1, samples - 1)), max_size=12))
    world = draw(st.integers(1, 3))
    batch = world * draw(st.integers(1, 8))
    ends = sorted({cut for cut in cuts if cut < samples} | {samples})
    return np.array(ends), draw(st.integers(1, 6)), draw(st.sampled_from(divisors(batch))), batch, world


@given(made=orders(), seed=st.integers(0, 2**63 - 1), stop=st.integers(0, 12))
@settings(max_examples=80, deadline=None)
def test_every_sample_once_per_epoch_on_any_number_of_ranks_and_after_a_resume(made, seed, stop):
    ends, block_shards, lanes, batch, world = made
    plan, samples, steps = plan_batches(batch, None, world), int(ends[-1]), 15

    def fresh():
        return BlockOrder(ends, seed, block_shards, lanes, batch)

    epochs, ids = fresh().locate(np.arange(steps * batch))
    ranks = [fresh() for _ in range(world)]
    for step in range(steps):
        if step == stop:
            ranks = [fresh() for _ in range(world)]  # nothing is remembered
        parts = [order.locate(step * batch + plan.slots(rank, 0)) for rank, order in enumerate(ranks)]
        here = slice(step * batch, (step + 1) * batch)
        assert np.array_equal(np.concatenate([part[0] for part in parts]), epochs[here])
        assert np.array_equal(np.concatenate([part[1] for part in parts]), ids[here])
        # After a step as many samples of each epoch have been seen as with a full permutation.
        expected = SampleOrder(samples, 0).locate(np.arange((step + 1) * batch))[0]
        assert np.array_equal(np.sort(epochs[: (step + 1) * batch]), expected)
    for epoch in range(steps * batch // samples):
        assert sorted(ids[epochs == epoch].tolist()) == list(range(samples))
    rest = ids[epochs == steps * batch // samples]
    assert len(set(rest.tolist())) == len(rest) and 0 <= ids.min() and ids.max() < samples


@given(made=orders(), seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_lanes_walk_through_contiguous_parts_of_the_same_order(made, seed):
    ends, block_shards, lanes, batch, _ = made
    samples, width = int(ends[-1]), batch // lanes
    steps = 4 * samples // batch + 4
    whole = BlockOrder(ends, seed, block_shards).locate(np.arange(3 * samples))[1].reshape(3, samples)
    order = BlockOrder(ends, seed, block_shards, lanes, batch)
    walks = []
    for lane in range(lanes):
        slots = lane * width + np.arange(width)
        walks.append(order.locate((np.arange(steps)[:, None] * batch + slots).reshape(-1)))
    for epoch in range(3):
        parts = [ids[epochs == epoch] for epochs, ids in walks]
        assert np.array_equal(np.concatenate(parts), whole[epoch])
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert [(begin, end) for begin, end in itertools.pairwise(np.cumsum([0, *map(len, parts)]).tolist())] == [
            order.lanes.part(lane, epoch, samples) for lane in range(lanes)
        ]
    assert all((np.diff(epochs) >= 0).all() for epochs, _ in walks)


def test_blocks_are_cut_evenly():
    order = BlockOrder(np.arange(1, 18) * 5, 0, 16)  # 17 shards: not 16 and a lonely one
    assert np.diff(order._epoch(0).starts).tolist() == [40, 45]
    order = BlockOrder(np.arange(1, 501) * 3, 1, 16)
    ids = order.locate(np.arange(1500))[1] // 3
    for begin, end in itertools.pairwise(order._epoch(0).starts.tolist()):
        block = ids[begin:end]
        assert len(set(block)) in (15, 16) and (np.bincount(block)[block] == 3).all()  # whole shards
        assert (np.diff(block) == 0).sum() < 15  # not one shard after the other


def test_the_same_for_good():
    """A change of these numbers would change every run that is resumed."""
    assert shuffled(0, 19, 0, 0, 10).tolist() == PINNED_WORDS
    ends = np.array([3, 5, 9, 10, 14, 16])
    assert BlockOrder(ends, 7, 2).locate(np.arange(16))[1].tolist() == PINNED_EPOCH
    epochs, ids = BlockOrder(ends, 7, 2, lanes=2, global_batch=4).locate(np.arange(12, 24))
    assert epochs.tolist() == PINNED_EPOCHS and ids.tolist() == PINNED_IDS
    far = BlockOrder(ends, 7, 2, lanes=4, global_batch=8).locate(10**15 + np.arange(3))
    assert [each.tolist() for each in far] == PINNED_FAR


PINNED_WORDS = [6, 7, 8, 2, 9, 5, 0, 3, 1, 4]
PINNED_EPOCH = [4, 11, 12, 13, 10, 3, 6, 1, 7, 5, 2, 0, 8, 15, 9, 14]
PINNED_EPOCHS = [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
PINNED_IDS = [6, 1, 9, 14, 6, 12, 1, 2, 5, 7, 15, 0]
PINNED_FAR = [[62500000000000, 62500000000000, 62500000000000], [6, 10, 12]]


def test_epochs_seeds_and_blocks_differ():
    ends = np.arange(1, 41) * 25
    first = BlockOrder(ends, 0, 4).locate(np.arange(2000))[1]
    assert (first[:1000] == first[1000:]).mean() < 0.02
    assert (first != BlockOrder(ends, 1, 4).locate(np.arange(2000))[1]).mean() > 0.98
    assert shuffled(2**64 - 1, 20, 0, 0, 50).tolist() != shuffled(2**64 - 3, 20, 0, 0, 50).tolist()
    inside = [shuffled(0, 20, 0, block, 100).tolist() for block in range(20)]
    assert len(set(map(tuple, inside))) == 20


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 1000])
def test_shuffled_is_a_permutation(count):
    found = shuffled(5, 19, 2, 1, count)
    assert found.dtype == np.int64 and np.array_equal(np.sort(found), np.arange(count))


def test_shuffled_is_uniform():
    """All 24 permutations of four things, and every thing at every place of a longer list."""
    seen = np.zeros(256, dtype=int)
    for epoch in range(4800):
        seen[int(shuffled(1, 19, epoch, 0, 4) @ [64, 16, 4, 1])] += 1
    seen = seen[seen > 0]
    assert len(seen) == 24 and ((seen - 200) ** 2 / 200).sum() < 60  # chi square of 23 degrees of freedom: 1 in 30,000
    places = np.zeros((20, 20))
    for epoch in range(2000):
        places[np.arange(20), shuffled(2, 19, epoch, 0, 20)] += 1
    assert ((places - 100) ** 2 / 100).sum() < 500  # of 361: 1 in 500,000


def test_no_stream_is_used_for_two_purposes():
    own = [getattr(block_order, name) for name in dir(block_order) if name.startswith("ORDER_")]
    others = [philox.ORDER, philox.TIMESTEPS, philox.LABEL_DROP]
    assert len(set(own + others)) == len(own) + 3 and max(own) < philox.DROPOUT


@given(made=orders(), step=st.integers(0, 30), count=st.integers(1, 12), data=st.data())
@settings(max_examples=100, deadline=None)
def test_shards_ahead_are_those_that_are_needed_next(made, step, count, data):
    ends, block_shards, lanes, batch, world = made
    order, width = BlockOrder(ends, 5, block_shards, lanes, batch), batch // lanes

    def needed(slots):
        """Shards in the order of their first use, in this epoch of each lane and the next one."""
        steps = np.arange(step, step + 3 * int(ends[-1]))
        epochs, used = order.locate(steps[:, None] * batch + slots)
        last = order.locate(step * batch + slots // width * width)[0] + 1
        return list(dict.fromkeys(np.searchsorted(ends, used[epochs <= last], side="right").tolist()))

    own = sorted(data.draw(st.sets(st.integers(0, lanes - 1), min_size=1)))
    slots = (np.array(own)[:, None] * width + np.arange(width)).reshape(-1)
    found, wanted = order.shards_ahead(step, slots, count).tolist(), needed(slots)
    assert len(set(found)) == len(found) <= count and found[0] == wanted[0]
    assert set(wanted) <= set(order.shards_ahead(step, slots, len(ends)).tolist())
    if lanes == 1:
        assert len(found) == min(count, len(wanted)) and set(found) <= set(wanted)
    # In front of a shard are those of the blocks that have begun by then; where two lanes meet they are the blocks of both.
    before = len(own) * block_shards * (1 if lanes == 1 else 3)
    for place, shard in enumerate(wanted):
        if place + before <= len(found):
            assert shard in found[: place + before]
    part = plan_batches(batch, None, world).slots(data.draw(st.integers(0, world - 1)), 0)  # cuts lanes
    assert set(needed(part)) <= set(order.shards_ahead(step, part, len(ends)).tolist())


@given(made=orders(), place=st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_shards_of_the_block_that_has_begun_are_in_the_order_of_their_use(made, place):
    ends, block_shards = made[:2]
    order, samples = BlockOrder(ends, 5, block_shards), int(ends[-1])
    edges = np.concatenate([epoch * samples + order._epoch(epoch).starts[1:] for epoch in range(place // samples + 1)])
    used = order.locate(np.arange(place, edges[edges > place][0]))[1]
    begun = list(dict.fromkeys(np.searchsorted(ends, used, side="right").tolist()))
    found = order.shards_ahead(place, np.array([0]), len(ends)).tolist()
    assert found[: len(begun)] == begun and sorted(found) == list(range(len(ends)))


def test_shards_ahead_where_a_block_is_longer_than_what_is_looked_at(monkeypatch):
    monkeypatch.setattr(block_order, "LOOKED_AT", 6)
    order = BlockOrder(np.arange(1, 13) * 20, 3, 6)
    for place in range(0, 240):
        used = order.locate(np.arange(place, 120 if place < 120 else 240))[1] // 20
        begun = list(dict.fromkeys(used.tolist()))
        exact = list(dict.fromkeys(used[:6].tolist()))
        found = order.shards_ahead(place, np.array([0]), 12).tolist()
        assert found[: len(exact)] == exact and set(found[: len(begun)]) == set(begun)
        assert set(order.shards_ahead(place // 4, np.array([2]), 12).tolist()) == set(range(12))


def test_the_first_shard_ahead_is_that_of_the_own_slots():
    """Two ranks share a lane: each is told what its own samples need first."""
    order = BlockOrder(np.arange(1, 17) * 30, 3, 8, 2, 8)
    for slot in range(8):
        used = order.locate(np.arange(30) * 8 + slot)[1] // 30
        begun = list(dict.fromkeys(used.tolist()))
        assert order.shards_ahead(0, np.array([slot]), len(begun)).tolist() == begun


def test_each_rank_touches_the_shards_of_its_lanes_only():
    ends = np.arange(1, 257) * 10
    for lanes, world in ((4, 4), (4, 2), (8, 2)):
        plan = plan_batches(32, None, world)
        steps = len(ends) * 10 // 32
        touched = []
        for rank in range(world):
            order = BlockOrder(ends, 0, 4, lanes, 32)
            ids = np.concatenate([order.locate(step * 32 + plan.slots(rank, 0))[1] for step in range(steps)])
            touched.append(set((ids // 10).tolist()))
        assert sum(map(len, touched)) <= 256 + 4 * lanes  # only a block where two lanes meet is used by both
        assert set().union(*touched) == set(range(256))
    order = BlockOrder(ends, 0, 4, 1, 32)  # without lanes each of two ranks needs everything
    ids = np.concatenate([order.locate(step * 32 + np.arange(16))[1] for step in range(80)])
    assert len(set((ids // 10).tolist())) > 250


def test_a_block_is_made_once_and_few_are_kept(monkeypatch):
    made = []
    block = BlockOrder._block
    monkeypatch.setattr(BlockOrder, "_block", lambda self, *key: made.append(key) or block(self, *key))
    order = BlockOrder(np.arange(1, 201) * 20, 0, 5, 4, 32)
    for step in range(250):  # two epochs, in micro-batches of half a lane
        for begin in range(0, 32, 4):
            order.locate(step * 32 + begin + np.arange(4))
            assert len(order._held) <= 8 and len(order._epochs) <= 3
    assert len(made) == len(set(made)) == 80  # two epochs of 40 blocks: lanes meet where blocks do


def test_positions_of_any_shape_and_none():
    order = BlockOrder(np.array([4, 9]), 0, 1)
    epochs, ids = order.locate(np.arange(6).reshape(2, 3))
    assert epochs.shape == ids.shape == (2, 3) and ids.dtype == epochs.dtype == np.int64
    assert order.locate(np.array([], dtype=np.int64))[1].shape == (0,)


def test_bad_values_are_refused():
    with pytest.raises(UserError, match="lanes=3 does not divide train.global_batch=8.*choose 1, 2, 4 or 8"):
        BlockOrder(np.array([4, 9]), 0, 1, 3, 8)
    with pytest.raises(UserError, match="data.lanes=0"):
        BlockOrder(np.array([4, 9]), 0, 1, 0, 8)
    with pytest.raises(UserError, match="block_shards=0"):
        BlockOrder(np.array([4, 9]), 0, 0)
