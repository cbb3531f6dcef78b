"""Training on shards behind a real HTTP server: the run of local shards, each fetched once per node, whatever the server does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, environment, lines, train
from shard_server import ShardServer

from ddpm_dist.config import Data
from ddpm_dist.data.large_index import write_large_index
from ddpm_dist.data.order import plan_batches
from ddpm_dist.data.pipeline import Loader, open_index, shard_batches
from ddpm_dist.data.reading import Reader
from ddpm_dist.data.shards import Index
from ddpm_dist.errors import UserError
from ddpm_dist.pack import pack
from ddpm_dist.runtime import Runtime

AUDIT = ("train.audit=true", "train.images=96", "data.channels=3")
ALONE = Runtime(0, 1, 0, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "shapes"
    pack("shapes", folder, size=16, num=48, samples_per_shard=8, workers=1)
    return folder


@pytest.fixture
def server():
    made = ShardServer()
    yield made
    made.close()


@pytest.fixture
def remote(local, server, tmp_path) -> Path:
    """An index of the same shards, which lie on the server."""
    index, folder = Index.load(local), tmp_path / "index"
    folder.mkdir()
    for shard in index.shards:
        server.add(f"set/{shard.name}", (local / shard.name).read_bytes())
    root = f"http://{server.host}/set"
    write_large_index(folder, index.shards, index.samples, index.classes, index.channels, index.image_format, root)
    return folder


def seen(folder: Path) -> list:
    return [line["slots"] for line in lines(folder / "audit.jsonl")]


def ok(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_the_run_of_local_shards_and_each_shard_comes_once(tmp_path, local, remote, server):
    ok(train(tmp_path / "near", *AUDIT, shards=local))
    server.files[next(iter(server.files))].cut = [3000, None]  # one of them is cut once
    cache = (f"data.cache_dir={tmp_path / 'cache'}", "data.cache_dir_gb=0.1")
    ok(train(tmp_path / "far", *AUDIT, *cache, "train.images=48", "optim.decay_images=96", shards=remote, ranks=2))
    ok(train(tmp_path / "far", *AUDIT, *cache, "optim.decay_images=96", shards=remote))
    assert seen(tmp_path / "far") == seen(tmp_path / "near")
    asked = [path for path, _ in server.requests]
    assert len(asked) == len(server.files) + 1 == 7  # and the one that was cut, where it stopped
    assert server.sent <= 1.01 * sum(len(served.data) for served in server.files.values())


def test_without_a_cache_it_is_said_what_to_do(tmp_path, remote, server):
    done = train(tmp_path / "run", *AUDIT, shards=remote)
    assert done.returncode == 2 and "set data.cache_dir" in done.stderr
    assert not server.requests


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_a_copy_that_was_damaged_on_this_node_is_fetched_again(tmp_path, remote, server, on_bad):
    """While it is open and before it is opened; no sample is bad because of it."""
    settings = Data(
        shards=str(remote),
        image_size=16,
        num_classes=10,
        cache_dir=str(tmp_path / "cache"),
        cache="none",
        on_bad=on_bad,
    )

    def epoch(after_one=lambda: None) -> list:
        index, found = open_index(settings, ""), []
        batches = shard_batches(index, settings, plan_batches(8, None, 1), ALONE, 3, range(6), "cpu")
        for batch in batches:
            found.append((batch.ids.tolist(), batch.pixels.numpy().tobytes(), batch.replaced))
            after_one()
            after_one = lambda: None  # noqa: E731
        index.close()
        return found

    def damage() -> None:
        for path in (tmp_path / "cache").glob("*.tar"):
            data = np.memmap(path, dtype=np.uint8)
            data[600::512] ^= 1  # in every image
            data.flush()

    whole = epoch()
    asked = len(server.requests)
    assert asked == 6
    damage()
    assert epoch() == whole and len(server.requests) == asked + 6, server.requests
    assert epoch(damage) == whole and asked + 6 < len(server.requests) <= asked + 12
    assert all(replaced == 0 for _, _, replaced in whole)


def test_several_readers_find_the_same_damage(tmp_path, remote, server):
    settings = Data(shards=str(remote), image_size=16, num_classes=10, cache_dir=str(tmp_path / "cache"))
    index, order = open_index(settings, ""), np.random.default_rng(0)
    whole = index.read_many(np.arange(48))
    for _ in range(20):
        for path in (tmp_path / "cache").glob("*.tar"):
            data = np.memmap(path, dtype=np.uint8)
            data[int(order.integers(600, len(data) - 2000)) :: 700] ^= 1
            data.flush()
        index.want(np.arange(6))
        ids = order.permutation(48)
        with Reader(index, True) as read:
            assert read(ids) == [whole[sample] for sample in ids]
    index.close()


@pytest.mark.parametrize(("how", "said"), [({"flip": [100]}, "sha256"), ({"status": [404]}, "404")])
def test_a_shard_that_cannot_be_had_ends_the_run_by_name(tmp_path, remote, server, how, said):
    name, served = list(server.files.items())[3]
    for key, value in how.items():
        setattr(served, key, value)
    done = train(
        tmp_path / "run",
        *AUDIT,
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.fetch_patience=20",
        shards=remote,
        ranks=2,
    )
    assert done.returncode != 0 and Path(name).name in done.stderr and said in done.stderr
    exit_code = json.loads((tmp_path / "run" / "exit.json").read_text())["code"]
    assert exit_code == 2


def test_commands_run_only_when_they_are_allowed(tmp_path, local):
    index, folder = Index.load(local), tmp_path / "index"
    folder.mkdir()
    from ddpm_dist.data.shards import Shard

    ran = tmp_path / "ran"
    names = [Shard(f"pipe:touch {ran}; cat {local / s.name}", s.samples, s.bytes, s.sha256) for s in index.shards]
    write_large_index(folder, names, index.samples, index.classes, index.channels, index.image_format, "")
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    done = train(tmp_path / "run", *AUDIT, cache, shards=folder)
    assert done.returncode == 2 and "data.allow_pipe=true" in done.stderr and not ran.exists()
    ok(train(tmp_path / "run", *AUDIT, "train.images=24", cache, "data.allow_pipe=true", shards=folder))
    assert ran.exists()


def test_the_first_batch_comes_before_the_third_shard(tmp_path, remote, server):
    settings = Data(
        shards=str(remote),
        image_size=16,
        num_classes=10,
        order="blocks",
        block_shards=1,
        cache_dir=str(tmp_path / "cache"),
    )
    index, plan = open_index(settings, ""), plan_batches(8, None, 1)
    order = [Path(index.location(int(n))).name for n in index.shard_of(_first_ids(index, settings, plan))]
    first, held = threading.Event(), threading.Event()
    for name, served in server.files.items():
        if Path(name).name not in order[:16]:  # all but the first two shards
            served.hold = held
        elif Path(name).name == order[0]:
            served.hold = first
    rank = Runtime(0, 1, 0, torch.device("cpu"), None)
    loader = Loader(shard_batches(index, settings, plan, rank, 3, range(6), "cpu"), torch.device("cpu"))
    try:
        time.sleep(1)
        assert [Path(path).name for path, _ in server.requests] == order[:1]  # it has the line for itself
        first.set()
        assert loader.next().pixels.shape == (8, 3, 16, 16)
        held.set()
        assert sorted(np.concatenate([loader.next().ids for _ in range(5)]).tolist())[-1] < 48
    finally:
        first.set(), held.set()
        index.close()
        loader.close()


def _first_ids(index: Index, settings: Data, plan) -> np.ndarray:
    from ddpm_dist.data.choose_order import make_order

    return make_order(index, settings, 3, plan.global_batch).locate(np.arange(48))[1]


def test_a_stop_does_not_wait_for_a_shard(tmp_path, remote, server):
    for served in list(server.files.values())[2:]:
        served.hold = threading.Event()  # for 30 seconds
    words = [
        sys.executable, "-m", "ddpm_dist.train", f"run.dir={tmp_path / 'run'}", *TINY, *AUDIT, f"data.shards={remote}",
        f"data.cache_dir={tmp_path / 'cache'}", "data.order=blocks", "data.block_shards=1",
        "train.precision=fp32", "train.compile=false",
    ]  # fmt: skip
    with subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("step 1"):
                break
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        said = process.stdout.read()
        code = process.wait(60)
    assert code in (0, 75), said
    assert time.monotonic() - begun < 45, said


def test_a_mix_of_near_and_far(tmp_path, local, remote):
    pack("shapes", tmp_path / "second", size=16, num=24, samples_per_shard=8, workers=1, seed=5)
    mix = f"data.mix=[{{shards: {remote}}}, {{shards: {tmp_path / 'second'}}}]"
    ok(train(tmp_path / "run", *AUDIT, "data.source=shards", mix, f"data.cache_dir={tmp_path / 'cache'}"))
    found = {slot["id"] for slots in seen(tmp_path / "run") for slot in slots}
    assert min(found) < 48 <= max(found)


def test_messages_never_name_credentials(remote, tmp_path):
    from shutil import copytree

    copytree(remote, tmp_path / "secret")
    head = json.loads((tmp_path / "secret" / "index.json").read_text())
    head["root"] = head["root"].replace("http://", "http://me:hunter2@")
    (tmp_path / "secret" / "index.json").write_text(json.dumps(head))
    settings = Data(shards=str(tmp_path / "secret"), image_size=16, num_classes=10)
    with pytest.raises(UserError) as caught:
        open_index(settings, "")
    assert "hunter2" not in str(caught.value) and "127.0.0.1" in str(caught.value)
    index = Index.load(tmp_path / "secret")
    assert "hunter2" not in index.describe(3)
