"""One run, whatever the engine: DDP and every ZeRO stage compute the same, and each continues what another has left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, environment, lines, train
from engine_runs import ENGINES, several

from ddpm_dist.config import load_config
from ddpm_dist.data.order import plan_batches
from ddpm_dist.engines import check_engine
from ddpm_dist.errors import UserError

ROOT = Path(__file__).parent
NAMES = list(ENGINES)
AUDIT = ("train.audit=true", "train.audit_params_every=1")


def loss(line: dict) -> float:
    return float.fromhex(line["loss"])


def assert_same_run(a: list[dict], b: list[dict], what: str, tolerance: float = 1e-6) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert (x["step"], x["images_seen"], x["slots"]) == (y["step"], y["images_seen"], y["slots"]), what
        assert loss(y) == pytest.approx(loss(x), rel=tolerance), f"{what}: step {x['step']}"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_stage_follows_ddp_over_50_steps(tmp_path, ranks):
    common = ["data.source=synthetic", "train.images=600", "train.audit=true", "train.log_every=10"]
    several(tmp_path, (ranks, [[f"run.dir={tmp_path / name}", *common, *ENGINES[name]] for name in NAMES]))
    expected = lines(tmp_path / "ddp/audit.jsonl")
    assert len(expected) == 50 and loss(expected[-1]) < 0.97 * loss(expected[0]), "nothing was learned"
    for name in NAMES[1:]:
        assert_same_run(expected, lines(tmp_path / name / "audit.jsonl"), name)
    norms = {name: [r["grad_norm"] for r in lines(tmp_path / name / "metrics.jsonl")] for name in NAMES}
    for name in NAMES[1:]:
        assert norms[name] == pytest.approx(norms["ddp"], rel=1e-4), name


# Every pair of engines once, every pair of world sizes at least once.
WORLDS = [(a, b) for a in (1, 2, 3, 4) for b in (1, 2, 3, 4)]
HANDOVERS = [
    (first, second, *WORLDS[(5 * i + 7 * j + i) % len(WORLDS)])
    for i, first in enumerate(NAMES)
    for j, second in enumerate(NAMES)
]


def test_the_matrix_covers_every_pair_of_engines_and_of_world_sizes():
    assert {(a, b) for a, b, *_ in HANDOVERS} == {(a, b) for a in NAMES for b in NAMES}
    assert {(v, w) for *_, v, w in HANDOVERS} == set(WORLDS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_any_engine_and_world_size_continues_what_any_other_has_left(tmp_path):
    """6 steps under one engine and world size, 6 more under another: the same run as 12 steps under DDP on one rank."""
    common = ["data.source=synthetic", "train.log_every=6", "optim.decay_images=144", *AUDIT, "optim.lr=1e-3"]
    first, second = ["train.images=72"], ["train.images=144"]
    straight = ["ddp_1"] + sorted({f"{b}_{w}" for a, b, v, w in HANDOVERS if (a, v) == (b, w)} - {"ddp_1"})
    jobs = []
    for ranks in (1, 2, 3, 4):
        runs = [
            [f"run.dir={tmp_path / name}", *common, *second, *ENGINES[name.split("_")[0]]]
            for name in straight
            if name.endswith(str(ranks))
        ]
        runs += [
            [f"run.dir={tmp_path}/{a}{v}_{b}{w}", *common, *first, *ENGINES[a]]
            for a, b, v, w in HANDOVERS
            if v == ranks
        ]
        jobs.append((ranks, runs))
    for ranks in (1, 2, 3, 4):
        runs = [
            [f"run.dir={tmp_path}/{a}{v}_{b}{w}", *common, *second, *ENGINES[b]]
            for a, b, v, w in HANDOVERS
            if w == ranks
        ]
        jobs.append((ranks, runs))
    several(tmp_path, *jobs)
    expected = lines(tmp_path / "ddp_1/audit.jsonl")
    for a, b, v, w in HANDOVERS:
        found = lines(tmp_path / f"{a}{v}_{b}{w}/audit.jsonl")
        assert_same_run(expected, found, f"{a} on {v}, then {b} on {w}")
        if (a, v) == (b, w):
            assert found == lines(tmp_path / f"{b}_{w}/audit.jsonl"), f"{a} on {v} is not bitwise"
    assert any((a, v) == (b, w) for a, b, v, w in HANDOVERS)


@pytest.mark.slow
def test_bitwise_resume_of_every_engine(tmp_path):
    """Two ranks, accumulation, clipping, previews: 4 + 4 steps are 8 steps to the last bit, averages and moments included."""
    common = ["data.source=synthetic", "train.micro_batch=2", "train.grad_clip=0.5", "optim.decay_images=96", *AUDIT]
    common += ["sampling.every=48", "sampling.num=4", "ema.warmup=24"]
    names = NAMES
    runs = [[f"run.dir={tmp_path}/{n}", *common, "train.images=96", *ENGINES[n]] for n in names]
    for images in (48, 96):
        runs += [[f"run.dir={tmp_path}/{n}_twice", *common, f"train.images={images}", *ENGINES[n]] for n in names]
    several(tmp_path, (2, runs))
    pictures = set()
    for name in names:
        whole, twice = lines(tmp_path / name / "audit.jsonl"), lines(tmp_path / f"{name}_twice/audit.jsonl")
        assert len(whole) == 8 and whole == twice, name
        assert_same_run(lines(tmp_path / "ddp/audit.jsonl"), whole, name)
        pictures.add((tmp_path / name / "samples/step_00000004.png").read_bytes())
        norms = [record["grad_norm"] for record in lines(tmp_path / name / "metrics.jsonl")]
        assert min(norms) > 0.5, "nothing was clipped"
    assert len(pictures) == 1, "the previews differ between engines"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_of_every_engine(tmp_path, precision):
    common = ["data.source=synthetic", "train.images=240", "train.log_every=1", "optim.lr=1e-3", "train.audit=true"]
    mixed = [*common, f"train.precision={precision}"]
    runs = [[f"run.dir={tmp_path}/{name}", *mixed, *ENGINES[name]] for name in NAMES]
    runs.append([f"run.dir={tmp_path}/fp32", *common])
    if precision == "bf16":
        pure = [*mixed, "engine.param_dtype=bf16", "train.micro_batch=3"]
        runs += [[f"run.dir={tmp_path}/pure{stage}", *pure, *ENGINES[f"zero{stage}"]] for stage in (1, 2, 3)]
    several(tmp_path, (2, runs))
    full, ddp = lines(tmp_path / "fp32/audit.jsonl"), lines(tmp_path / "ddp/audit.jsonl")
    assert loss(ddp[0]) != loss(full[0]), "autocast was not on"
    for name in NAMES[1:]:
        found = lines(tmp_path / name / "audit.jsonl")
        # The same roundings in the same places; what differs is the order of sums between ranks.
        assert_same_run(ddp, found, name, tolerance=2e-3)
        assert loss(found[0]) == pytest.approx(loss(ddp[0]), rel=1e-6)
    if precision == "fp16":
        skipped = {name: [r["skipped_steps"] for r in lines(tmp_path / name / "metrics.jsonl")] for name in NAMES}
        assert all(skipped[name] == skipped["ddp"] for name in NAMES)
    else:
        for stage in (1, 2, 3):
            found = lines(tmp_path / f"pure{stage}/audit.jsonl")
            assert loss(found[0]) != loss(ddp[0]) and loss(found[-1]) < 0.9 * loss(found[0])
            assert loss(found[-1]) == pytest.approx(loss(full[-1]), rel=0.05)
            state = checkpoint_tensors(tmp_path / f"pure{stage}")
            assert state == checkpoint_tensors(tmp_path / "ddp"), "masters are fp32, under the same names"


def checkpoint_tensors(run: Path) -> dict[str, tuple]:
    """Name -> (dtype, shape) of the newest checkpoint."""
    newest = max((run / "checkpoints").glob("step_*"))
    manifest = json.loads((newest / "manifest.json").read_text())["manifest"]
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in manifest["tensors"].items()}


@pytest.mark.slow
def test_an_offloaded_optimizer_is_the_same_run(tmp_path):
    common = ["data.source=synthetic", "train.images=96", "train.grad_clip=0.5", "train.audit=true"]
    offload = [*common, "engine.offload_optimizer=true"]
    runs = [[f"run.dir={tmp_path}/ddp", *common]]
    runs += [[f"run.dir={tmp_path}/offload{stage}", *offload, *ENGINES[f"zero{stage}"]] for stage in (1, 2, 3)]
    several(tmp_path, (2, runs))
    for stage in (1, 2, 3):
        found = lines(tmp_path / f"offload{stage}/audit.jsonl")
        assert_same_run(lines(tmp_path / "ddp/audit.jsonl"), found, f"stage {stage}")


@pytest.mark.slow
def test_compiled_engines_follow_eager_ones(tmp_path):
    common = ["data.source=synthetic", "train.images=36", "train.audit=true", "model.attention_levels=[]"]
    runs = [[f"run.dir={tmp_path}/eager", *common]]
    switched = [*common, "train.compile=true", "train.channels_last=true"]
    # Stage 3 hangs hooks on every layer, the others none.
    names = ["zero1", "zero3"]
    runs += [[f"run.dir={tmp_path}/{name}", *switched, *ENGINES[name]] for name in names]
    several(tmp_path, (2, runs))
    for name in names:
        found = lines(tmp_path / name / "audit.jsonl")
        assert_same_run(lines(tmp_path / "eager/audit.jsonl"), found, name, tolerance=1e-4)


@pytest.mark.slow
def test_a_non_finite_loss_on_one_rank_is_applied_by_no_engine(tmp_path):
    """Promise 15: never applied, averaged or saved; the position goes on and the skip is counted."""
    common = ["data.source=synthetic", "train.images=60", *AUDIT]
    runs = [[f"run.dir={tmp_path / name}", *common, *ENGINES[name]] for name in NAMES]
    several(tmp_path, (2, runs), script="poisoned_runs.py")
    slots = [line["slots"] for line in lines(tmp_path / "ddp/audit.jsonl")]
    for name in NAMES:
        audit, metrics = lines(tmp_path / name / "audit.jsonl"), lines(tmp_path / name / "metrics.jsonl")
        assert [record["skipped_steps"] for record in metrics] == [0, 0, 1, 1, 1], name
        state = [(line["params"], line["optim"], line["ema"]) for line in audit]
        assert state[1] == state[2], f"{name}: a poisoned step was applied"
        assert state[2] != state[3] and len({line[0] for line in state}) == 4
        assert [line["slots"] for line in audit] == slots


@pytest.mark.slow
def test_a_fixed_tree_makes_parameters_equal_to_the_bit_on_every_world_size(tmp_path):
    """Promise 4: 1, 2, 3 and 4 ranks, and 2 -> 1 -> 4, with Adam, clipping and averages, over 20 steps."""
    common = ["data.source=synthetic", "optim.decay_images=240", "train.reduction=tree", "train.micro_batch=1", *AUDIT]
    common += ["train.grad_clip=0.5", "train.log_every=20", "optim.lr=1e-3"]
    jobs = []
    for ranks, images in ((2, 84), (1, 144), (4, 240), (3, None)):
        runs = [[f"run.dir={tmp_path}/{ranks}", *common, "train.images=240"]]
        if images:
            runs.append([f"run.dir={tmp_path}/mixed", *common, f"train.images={images}"])
        jobs.append((ranks, runs))
    usual = [*common, "train.reduction=all_reduce", "train.images=240"]
    jobs.append((2, [[f"run.dir={tmp_path}/usual", *usual]]))
    several(tmp_path, *jobs)
    expected = lines(tmp_path / "1/audit.jsonl")
    assert len(expected) == 20 and len({line["params"] for line in expected}) == 20
    for name in ("2", "3", "4", "mixed"):
        assert lines(tmp_path / name / "audit.jsonl") == expected, name
    found = lines(tmp_path / "usual/audit.jsonl")
    assert_same_run(expected, found, "all_reduce")
    assert found[-1]["params"] != expected[-1]["params"], "the test could not have failed"


def test_a_tree_needs_leaves_that_stay(tmp_path):
    run = tmp_path / "run"
    wrong = train(run, "train.reduction=tree", "train.images=24")
    assert wrong.returncode == 2 and "train.reduction=tree needs train.micro_batch" in wrong.stderr
    assert train(run, "train.reduction=tree", "train.micro_batch=2", "train.images=24").returncode == 0
    other = train(run, "train.reduction=tree", "train.micro_batch=3", "train.images=48", "optim.decay_images=24")
    assert other.returncode == 2 and "train.micro_batch: 2 in the checkpoint, 3 now" in other.stderr


def refused(tmp_path, *overrides: str) -> str:
    """Start a run that must be refused before anything is written; returns what it said."""
    result = train(tmp_path / "run", "train.images=24", *overrides)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()
    return result.stderr


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["engine.name=deepspeed", "engine.zero_stage=4"], ["engine.zero_stage", "got 4"]),
        (["engine.zero_stage=2"], ["engine.zero_stage is DeepSpeed's", "engine.name=deepspeed"]),
        (["engine.name=fsdp"], ["engine.name", "ddp", "deepspeed"]),
        (
            ["engine.name=deepspeed", "engine.zero_stage=0", "engine.offload_optimizer=true"],
            ["engine.offload_optimizer needs engine.zero_stage 1, 2 or 3"],
        ),
        (
            ["engine.name=deepspeed", "engine.deepspeed={train_batch_size: 4}"],
            ["engine.deepspeed.train_batch_size", "train.global_batch"],
        ),
        (
            ["engine.name=deepspeed", "engine.deepspeed={zero_optimization: {stage: 3}}"],
            ["engine.deepspeed.zero_optimization.stage", "engine.zero_stage"],
        ),
        (
            ["engine.name=deepspeed", "engine.deepspeed={zero_optimization: {round_robin_gradients: true}}"],
            ["round_robin_gradients is not supported"],
        ),
        (
            ["engine.name=deepspeed", "engine.deepspeed={zero_optimization: {reduce_bucket_siez: 1}}"],
            ["engine.deepspeed.zero_optimization.reduce_bucket_siez", "DeepSpeed refuses"],
        ),
        (
            ["engine.name=deepspeed", "engine.deepspeed={zero_optimisation: {overlap_comm: true}}"],
            ["engine.deepspeed.zero_optimisation", "did you mean zero_optimization?"],
        ),
        (
            # 400 billion parameters: found on the meta device, before anything is allocated
            ["engine.name=deepspeed", "engine.offload_optimizer=true", "model.width=16384", "model.channel_mults=[1,2,4]"],
            ["engine.offload_optimizer needs about", "GiB are free"],
        ),
        (["engine.name=deepspeed", "engine.param_dtype=bf16"], ["engine.param_dtype=bf16 needs train.precision=bf16"]),
    ],
)  # fmt: skip
def test_an_engine_that_cannot_be_is_refused(tmp_path, overrides, words):
    said = refused(tmp_path, *overrides)
    assert all(word in said for word in words), said


def test_a_missing_package_names_the_extra(tmp_path):
    """As where only torch was installed: an import hook hides DeepSpeed."""
    script = tmp_path / "without.py"
    script.write_text(
        "import importlib.util, sys\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'deepspeed' else found(name, *a)\n"
        "sys.modules['deepspeed'] = None\n"
        "from ddpm_dist import train\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    arguments = [f"run.dir={tmp_path / 'run'}", *TINY, "data.source=synthetic", "engine.name=deepspeed"]
    (tmp_path / "empty.yaml").write_text("{}\n")
    done = subprocess.run(
        [sys.executable, str(script), "--config", str(tmp_path / "empty.yaml"), *arguments], env=environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "ddpm_dist[deepspeed]" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "stage, options, words",
    [
        (1, "{zero_optimization: null}", "zero_optimization must be a mapping"),
        (1, "{zero_optimization: [1]}", "zero_optimization must be a mapping"),
        (1, "{zero_optimization: {1: 2}}", "is no name of an option"),
        (1, "{'zero_optimization.reduce_scatter': false}", "write options of a section nested"),
        (1, "{zero_optimization: {cpu_offload: true}}", "conflicts with engine.offload_optimizer"),
        (3, "{zero_optimization: {cpu_offload_param: true}}", "parameters stay on the device"),
        (1, "{torch_autocast: []}", "torch_autocast must be a mapping"),
        (1, "{torch_autocast: {lower_precision_safe_modules: [no.such.Module]}}", "no class that can be imported"),
        (1, "{torch_autocast: {lower_precision_safe_modules: torch.nn.Linear}}", "give a list"),
        (1, "{timers: {throughput: 3}}", "conflicts with tracking"),
        (1, "{compile: {deepcompile: true}}", "conflicts with train.compile"),
        (1, "{communication_data_type: fp99}", "DeepSpeed refuses"),
        (1, "{flops_profiler: []}", "flops_profiler must be a mapping"),
        (1, "{flops_profiler: {enabled: perhaps}}", "DeepSpeed refuses"),
        (1, "{comms_logger: x}", "comms_logger must be a mapping"),
        (2, "{prescale_gradients: true}", "is not supported"),
        (2, "{gradient_predivide_factor: 2.0}", "is not supported"),
        (1, "{graph_harvesting: true}", "gone from DeepSpeed"),
        (1, "{activation_checkpointing: null}", "is not supported"),
        (1, "{aio: 5}", "is not supported"),
    ],
)
def test_options_that_deepspeed_would_stumble_over_are_refused(alone, stage, options, words):
    config = load_config(
        None, [*TINY, "engine.name=deepspeed", f"engine.zero_stage={stage}", f"engine.deepspeed={options}"]
    )
    with pytest.raises(UserError, match=words):
        check_engine(config, plan_batches(12, None, 1), alone)


@pytest.mark.parametrize("option", ["wall_clock_breakdown: true", "communication_data_type: fp16", "comms_logger: {enabled: true}",
                                    "torch_autocast: {lower_precision_safe_modules: [torch.nn.Linear]}"])  # fmt: skip
def test_good_options_pass(alone, option):
    config = load_config(None, [*TINY, "engine.name=deepspeed", "engine.deepspeed={" + option + "}"])
    check_engine(config, plan_batches(12, None, 1), alone)


def test_options_of_deepspeed_are_passed_through(tmp_path):
    from ddpm_dist.config import load_config
    from ddpm_dist.data.order import plan_batches
    from ddpm_dist.engines.deepspeed_config import generate

    extra = "engine.deepspeed={zero_optimization: {overlap_comm: true, reduce_bucket_size: 1000}, wall_clock_breakdown: true}"
    config = load_config(None, [*TINY, "engine.name=deepspeed", "engine.zero_stage=2", extra])
    values = generate(config, plan_batches(12, None, 2), 15_705)
    assert values["wall_clock_breakdown"] is True
    zero = values["zero_optimization"]
    assert (zero["overlap_comm"], zero["reduce_bucket_size"], zero["stage"]) == (True, 1000, 2)
    assert zero["compute_grad_norm"] is False and zero["allgather_bucket_size"] == 15_706
    assert values["train_micro_batch_size_per_gpu"] == 6


def test_a_checkpoint_of_another_network_lists_names_and_shapes(tmp_path):
    assert train(tmp_path / "run", "train.images=24").returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    for overrides in (("model.width=8",), ("model.width=8", "engine.name=deepspeed", "engine.zero_stage=3")):
        other = train(tmp_path / "run", "train.images=48", "optim.decay_images=24", *overrides)
        assert other.returncode == 2
        assert "model.width: 4 in the checkpoint, 8 now" in other.stderr
        assert "inc.double_conv.0.weight: [4, 1, 3, 3] in the file, [8, 1, 3, 3] in the network" in other.stderr
        assert "more" in other.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")} == before


WATCHED = """
import os, runpy
from ddpm_dist.checkpoint.format import Reader
read = Reader.read
def watched(self, name, start, stop):
    with open(os.environ["READS"], "a") as file:
        file.write(f"{os.environ['RANK']} {name} {stop - start}\\n")
    return read(self, name, start, stop)
Reader.read = watched
runpy.run_path(os.environ["SEVERAL_RUNS"], run_name="__main__")
"""


@pytest.mark.slow
def test_a_rank_reads_only_what_it_holds(tmp_path, monkeypatch):
    """A checkpoint of one rank under ZeRO-3 on four: of every kind of state each rank asks for its quarter, nothing twice."""
    (tmp_path / "watched.py").write_text(WATCHED)
    monkeypatch.setenv("READS", str(tmp_path / "reads"))
    common = ["data.source=synthetic", "optim.decay_images=48", f"run.dir={tmp_path / 'run'}"]
    several(tmp_path, (1, [[*common, "train.images=24"]]))
    continued = [*common, "train.images=48", *ENGINES["zero3"]]
    several(tmp_path, (4, [continued]), script=tmp_path / "watched.py")
    total, asked = 15_705, {}
    for line in (tmp_path / "reads").read_text().splitlines():
        rank, name, count = line.split()
        kind = name.split("/")[0]
        asked.setdefault(kind, {}).setdefault(rank, 0)
        asked[kind][rank] += int(count)
    for kind in ("model", "optim.exp_avg", "optim.exp_avg_sq", "ema.0", "ema.1"):
        assert len(asked[kind]) == 4 and sum(asked[kind].values()) == total, (kind, asked[kind])
        assert max(asked[kind].values()) < 0.27 * total


def test_deepspeed_on_a_single_process_without_a_launcher(tmp_path):
    result = train(tmp_path / "run", "train.images=24", *ENGINES["zero2"])
    assert result.returncode == 0, result.stderr
    assert train(tmp_path / "run", "train.images=36", "optim.decay_images=24").returncode == 0
