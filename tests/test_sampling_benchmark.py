"""The sampling benchmark: the loops it compares with compute the right thing, and its report fits together."""

from __future__ import annotations

import json
import resource
import statistics

import pytest
import torch

from benchmarks.reference import ReferenceUNet
from benchmarks.reference_sampling import DIFFUSERS, DiffusersSampling, ReferenceSampling
from benchmarks.sampling import main
from benchmarks.sampling_entrant import Entrant, OurSampling, out_of_memory
from ddpm_dist.diffusion import Schedule
from ddpm_dist.diffusion.reverse import implied_image
from ddpm_dist.diffusion.samplers import table
from ddpm_dist.models import build_model

CPU = torch.device("cpu")
TINY = ["data.image_size=16", "model.width=8", "diffusion.timesteps=12", "diffusion.t_min=1"]


def networks():
    torch.manual_seed(3)
    fast = build_model("unet_conditional", num_classes=10, width=8, image_size=16).eval()
    original = ReferenceUNet(num_classes=10, width=8, image_size=16).eval()
    original.load_state_dict(fast.state_dict())
    return fast, original


def test_all_ways_take_turns_and_the_report_fits_together(tmp_path, capsys):
    words = ["--batches", "1,2", "--samplers", "ddpm,dpmpp_2m:4,heun:3", "--turns", "3", "--turn-seconds", "0"]
    files = ["--json", str(tmp_path / "report.json"), "--markdown", str(tmp_path / "table.md")]
    assert main([*words, *files, *TINY]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["reference_skipped"] is None and report["environment"]["versions"]["torch"]
    entries = {(e["batch"], e["guidance"], e["sampler"], e["system"]): e for e in report["entries"]}
    assert len(entries) == len(report["entries"]) == 2 * 2 * (1 + 2 * 3)
    for (batch, guidance, sampler, system), each in entries.items():
        assert each["problem"] is None and each["measured_steps"] == 3
        evaluations = {"ddpm": 12 if system == "diffusers" else 11, "dpmpp_2m:4": 4, "heun:3": 5}[sampler]
        assert each["evaluations"] == evaluations
        assert each["step_ms"] == statistics.median(each["step_ms_turns"])
        assert each["images_per_sec"] == pytest.approx(batch / evaluations / each["step_ms"] * 1e3)
        assert each["whole_run_images_per_sec"] > 0
        if system == "reference":
            assert "to_reference" not in each
            continue
        original = entries[batch, guidance, "ddpm", "reference"]
        ratios = [
            a * 11 / (b * evaluations) for a, b in zip(original["step_ms_turns"], each["step_ms_turns"], strict=True)
        ]
        assert each["to_reference"]["median"] == pytest.approx(statistics.median(ratios))
        assert ("to_diffusers" in each) == (system == "ddpm_dist")
        if system == "ddpm_dist" and guidance != 1:
            line = f"- batch {batch}, guidance 3, {sampler}: {each['to_reference']['median']:.2f} times the original"
            assert line in printed
    assert (tmp_path / "table.md").read_text() == printed
    assert printed.count("\n| ") == len(entries) + 1


@pytest.fixture
def memory_limit():
    """Takes back the limit that the benchmark sets for its process."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_what_does_not_fit_is_reported_and_the_others_are_measured(tmp_path, capsys, memory_limit):
    # 64 images need 1 GB for one matrix of the original's attention at 32 pixels, ours need a fraction of that.
    words = ["--batches", "64", "--guidance", "1", "--samplers", "ddim:2", "--turns", "1", "--turn-seconds", "0"]
    words += ["--warmup", "0", "--memory-gb", "0.7", "--whole-below", "0", "--json", str(tmp_path / "report.json")]
    assert main([*words, "data.image_size=32", "model.width=4", "diffusion.timesteps=12"]) == 0
    entries = {each["system"]: each for each in json.loads((tmp_path / "report.json").read_text())["entries"]}
    assert entries["reference"]["problem"] == "out of memory" and "images_per_sec" not in entries["reference"]
    assert entries["ddpm_dist"]["problem"] is None and entries["ddpm_dist"]["images_per_sec"] > 0
    assert "to_reference" not in entries["ddpm_dist"] and entries["ddpm_dist"]["whole_run_images_per_sec"] is None
    assert "| original program | out of memory |" in capsys.readouterr().out


def test_only_a_lack_of_memory_is_a_result():
    def no_memory():
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        except RuntimeError:
            raise RuntimeError("operation failed during capture")  # noqa: B904 (as torch does)

    def broken():
        raise RuntimeError("shapes do not fit")

    entrant = Entrant("ddpm", "ddpm_dist", True, no_memory)
    entrant.attempt(entrant.open, 1, 0.1, CPU)
    assert entrant.problem == "out of memory"
    entrant.attempt(broken)  # is not tried any more
    with pytest.raises(RuntimeError, match="do not fit"):
        Entrant("ddpm", "ddpm_dist", True, broken).attempt(broken)
    assert not out_of_memory(ValueError("steps must lie in 1..11"))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_originals_loop_computes_ancestral_sampling(guidance):
    """A step of it, with its own noise, against our table in float64 and our network."""
    fast, original = networks()
    schedule, labels = Schedule(timesteps=20, t_min=1), torch.tensor([4, 7])
    loop = ReferenceSampling(original, (2, 3, 16, 16), labels, guidance, schedule)
    visited, matrices = table(schedule, "ddpm")
    p, q = implied_image(schedule, visited)
    torch.manual_seed(0)
    loop.start()
    assert loop.evaluations == len(visited) == 19
    for k, t in enumerate(visited.tolist()):
        x, state = loop.x, torch.random.get_rng_state()
        loop.step()
        after = torch.random.get_rng_state()
        torch.random.set_rng_state(state)
        noise = torch.randn_like(x)
        torch.random.set_rng_state(after)
        with torch.no_grad():
            at = torch.full((2,), t)
            predicted = fast(x, at, labels)
            if guidance != 1:
                without = fast(x, at, None)
                predicted = without + guidance * (predicted - without)
        of_x, of_x0, of_noise = matrices[k, 0]
        expected = of_x * x.double() + of_x0 * (p[k] * x + q[k] * predicted) + of_noise * noise
        torch.testing.assert_close(loop.x.double(), expected, rtol=1e-4, atol=1e-4)
    assert of_noise == 0
    with pytest.raises(StopIteration):
        loop.step()


@pytest.mark.parametrize("sampler", DIFFUSERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_diffusers_makes_images_with_our_network(sampler, guidance):
    pytest.importorskip("diffusers")
    fast, _ = networks()
    labels = torch.tensor([4, 7])
    loop = DiffusersSampling(fast, (2, 3, 16, 16), labels, guidance, Schedule(timesteps=20), sampler, 5, CPU)
    ours = OurSampling(
        fast, (2, 3, 16, 16), labels, Schedule(timesteps=20), sampler=sampler, steps=5, guidance=guidance, device=CPU
    )
    assert loop.evaluations == ours.evaluations == (9 if sampler == "heun" else 5)  # the same work
    images = loop.whole()
    assert images.shape == ours.whole().shape and bool(images.isfinite().all())


def test_diffusers_and_ours_make_the_same_images():
    """DDIM has no noise but the first, so the loops around the same network have to meet."""
    pytest.importorskip("diffusers")
    fast, _ = networks()
    labels, schedule, shape = torch.tensor([4, 7]), Schedule(timesteps=20), (2, 3, 16, 16)
    loop = DiffusersSampling(fast, shape, labels, 3.0, schedule, "ddim", 5, CPU)
    ours = OurSampling(
        fast, shape, labels, schedule, sampler="ddim", steps=5, spacing="leading", guidance=3.0, device=CPU
    )
    ours.start()
    loop.start()
    loop.x = ours.process.x.clone()
    for _ in range(5):
        ours.step()
        loop.step()
    torch.testing.assert_close(loop.x, ours.process.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--samplers", "euler"], "unknown sampler 'euler'"),
        (["--samplers", "ddim:many"], "steps must be a number"),
        (["--samplers", "ddim:13"], "steps must lie in 1..11"),
        (["--batches", "one"], "--batches must be numbers"),
        (["--batches", "0"], "--batches must be at least 1"),
        (["--turns", "0"], "--turns must be at least 1"),
        (["--guidance", "-1"], "--guidance"),
        (["--guidance", "3", "data.num_classes=null"], "no labels"),
        (["--json", "no/such/folder/report.json"], "does not exist"),
        (["model.widht=3"], "did you mean 'width'"),
    ],
)
def test_bad_input(words, says, capsys):
    assert main([*TINY, "--samplers", "ddpm", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and "Traceback" not in error
