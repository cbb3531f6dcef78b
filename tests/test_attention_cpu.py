"""Our attention for CPUs with bf16 arithmetic: as exact as torch's, the same on any number of threads, and only where it can run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import lines, train

from ddpm_dist import attention_backends as backends
from ddpm_dist import native
from ddpm_dist.errors import UserError
from ddpm_dist.models import attention_cpu
from ddpm_dist.models.blocks import Attention, attend

needs_bf16 = pytest.mark.skipif(
    not attention_cpu.is_made_for_this(), reason="this processor has no AVX-512 BF16 instructions"
)
SIXTEEN = "model.width=32"  # heads of 16 in the tiny network
BF16 = ("train.precision=bf16", SIXTEEN)


def by_torch(qkv):
    return attend(qkv, None)


def both(function, qkv, gradient):
    """Output and gradient."""
    leaf = qkv.detach().clone().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, gradient)[0]


def off(found, exact):
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def numbers(*shape, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


@needs_bf16
@pytest.mark.parametrize("width", attention_cpu.WIDTHS)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63, 64, 65, 129, 256, 1000])
def test_output_and_gradients_are_as_exact_as_torch_s(tokens, width):
    qkv, gradient = numbers(2, tokens, 3, 3, width, scale=1.5), numbers(2, tokens, 3, width, seed=1)
    exact = both(by_torch, qkv.double(), gradient.double())
    ours, theirs = both(attention_cpu.attention, qkv, gradient), both(by_torch, qkv, gradient)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torch.bfloat16 and mine.shape == right.shape
        assert off(mine, right) <= max(1.1 * off(other, right), 0.003)


@needs_bf16
@pytest.mark.parametrize("shift", [0.0, 25.0, -25.0])
def test_scores_of_hundreds_neither_overflow_nor_vanish(shift):
    """Scores from about -5,000 to 5,000, or all far above or below 0 (queries and keys share a direction)."""
    qkv, gradient = numbers(1, 77, 3, 2, 16, scale=40.0), numbers(1, 77, 2, 16, seed=1)
    if shift:
        qkv = numbers(1, 77, 3, 2, 16)
        qkv[:, :, 0] += abs(shift)
        qkv[:, :, 1] += shift
    exact = both(by_torch, qkv.double(), gradient.double())
    for mine, right in zip(both(attention_cpu.attention, qkv, gradient), exact, strict=True):
        assert mine.isfinite().all() and off(mine, right) < 0.02


@needs_bf16
def test_the_result_depends_neither_on_threads_nor_on_the_rest_of_the_batch():
    qkv, gradient = numbers(3, 200, 3, 2, 32), numbers(3, 200, 2, 32, seed=1)
    whole, before = both(attention_cpu.attention, qkv, gradient), torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 64):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, both(attention_cpu.attention, qkv, gradient), whole))
            one = both(attention_cpu.attention, qkv[1:2], gradient[1:2])
            assert all(torch.equal(a, b[1:2]) for a, b in zip(one, whole, strict=True))
    finally:
        torch.set_num_threads(before)


@needs_bf16
def test_layouts_that_are_not_contiguous():
    qkv, gradient = numbers(2, 3, 40, 4, 16).transpose(1, 2), numbers(2, 4, 40, 16, seed=1).transpose(1, 2)
    assert not qkv.is_contiguous() and not gradient.is_contiguous()
    mine = both(attention_cpu.attention, qkv, gradient)
    for found, expected in zip(
        mine, both(attention_cpu.attention, qkv.contiguous(), gradient.contiguous()), strict=True
    ):
        assert torch.equal(found, expected)


@needs_bf16
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_what_is_not_finite_stays_visible(value, part):
    """The guard against non-finite steps looks at what comes out."""
    qkv = numbers(1, 80, 3, 1, 16)
    qkv[0, 70, part, 0, 3] = value
    out, gradient = both(attention_cpu.attention, qkv, numbers(1, 80, 1, 16, seed=1))
    assert not gradient.isfinite().all()
    if value != value or part == 2:
        assert not out[0, 70].isfinite().all()


@needs_bf16
def test_an_empty_batch():
    out, gradient = both(attention_cpu.attention, numbers(0, 64, 3, 4, 16), numbers(0, 64, 4, 16))
    assert out.shape == (0, 64, 4, 16) and gradient.shape == (0, 64, 3, 4, 16)


@needs_bf16
def test_it_is_an_operation_that_torch_can_trace():
    qkv = numbers(1, 33, 3, 2, 16).requires_grad_()
    results = torch.library.opcheck(torch.ops.ddpm_dist.attention_cpu.default, (qkv,))
    assert set(results.values()) == {"SUCCESS"}


@needs_bf16
def test_other_sizes_of_heads_are_an_error_and_other_types_go_to_torch():
    with pytest.raises(RuntimeError, match="heads have 16, 32, 64 features"):
        attention_cpu.attention(numbers(1, 8, 3, 2, 24))
    qkv = torch.randn(1, 8, 3, 2, 16)
    assert torch.equal(attend(qkv, attention_cpu.attention), attend(qkv, None))


@needs_bf16
def test_auto_chooses_it_where_it_can_run(alone, monkeypatch, capsys):
    from test_attention_backends import config_of, network_of

    def chosen(*overrides):
        config = config_of(*overrides)
        network = network_of(config)
        assert backends.pin(network, config, 4, alone) == {}  # what a rule decides is not kept in the checkpoint
        return {module.backend for module in network.modules() if isinstance(module, Attention)}

    assert chosen(*BF16) == {attention_cpu.attention}
    assert chosen("train.precision=bf16") == {None}  # heads of 2
    assert chosen(SIXTEEN) == {None}  # float32
    assert capsys.readouterr().out == ""
    with monkeypatch.context() as patch:
        patch.setattr(attention_cpu, "_flags", lambda: frozenset(("amx_bf16", *attention_cpu.NEEDED)))
        assert chosen(*BF16) == {None}
        assert capsys.readouterr().out == ""
    with monkeypatch.context() as patch:
        patch.setattr(attention_cpu, "_answer", lambda: "there is no C++ compiler")
        assert chosen(*BF16) == {None}
        assert "attention: torch's own, which is slower" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"no cpu_bf16 attention for 64 tokens .*there is no C\+\+ compiler"):
            backends.pin(network_of(config_of(*BF16)), config_of(*BF16, "train.attention=cpu_bf16"), 4, alone)
    with pytest.raises(UserError, match="cpu_bf16 is for heads of 16, 32, 64 features"):
        chosen("train.precision=bf16", "train.attention=cpu_bf16")
    with pytest.raises(UserError, match="cpu_bf16 is for train.precision=bf16 on a CPU"):
        chosen(SIXTEEN, "train.attention=cpu_bf16")


@needs_bf16
def test_the_network_computes_the_same_with_it(alone):
    from test_attention_backends import config_of, network_of

    config = config_of(*BF16)
    plain, ours = network_of(config), network_of(config)
    backends.pin(ours, config, 4, alone)
    x, t, y = torch.randn(4, 1, 16, 16), torch.arange(4), torch.arange(4)
    exact = plain(x, t, y)
    exact.square().mean().backward()
    found = {}
    for name, network in {"torch": network_of(config), "ours": ours}.items():
        with torch.autocast("cpu", torch.bfloat16):
            out = network(x, t, y)
        out.float().square().mean().backward()
        gradients = [torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (network, plain)]
        found[name] = (off(out, exact.double()), off(gradients[0], gradients[1].double()))
    assert found["ours"][0] < 1.5 * found["torch"][0] + 1e-4 and found["ours"][1] < 1.5 * found["torch"][1] + 1e-4, (
        found
    )


@needs_bf16
def test_a_real_run_with_it_resumes_to_the_bit_and_follows_the_one_without(tmp_path):
    audit = (*BF16, "train.audit=true", "train.audit_params_every=1", "optim.decay_images=96")
    for images in (48, 96):
        result = train(tmp_path / "cut", f"train.images={images}", *audit, ranks=2)
        assert result.returncode == 0, result.stdout + result.stderr
    for name, kind in {"whole": "cpu_bf16", "torch": "flash"}.items():
        result = train(tmp_path / name, "train.images=96", *audit, f"train.attention={kind}", ranks=2)
        assert result.returncode == 0, result.stdout + result.stderr
    cut, whole, other = (lines(tmp_path / name / "audit.jsonl") for name in ("cut", "whole", "torch"))
    assert cut == whole and cut != other
    losses = [[record["loss"] for record in lines(tmp_path / name / "metrics.jsonl")] for name in ("whole", "torch")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


@needs_bf16
def test_without_a_compiler_training_goes_on_and_says_so(tmp_path):
    result = train(
        tmp_path / "run", "train.images=24", *BF16,
        CXX="/nowhere/c++", DDPM_DIST_CACHE=str(tmp_path / "cache"), ranks=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("attention: torch's own") == 1 and "/nowhere/c++ cannot be run" in result.stdout


@needs_bf16
@pytest.mark.skipif(not attention_cpu.pays(), reason="torch's own is used where there are matrix units")
def test_sampling_in_bf16_uses_it_and_gives_the_same_images(alone):
    from test_attention_backends import config_of, network_of

    from ddpm_dist.diffusion.reverse import ReverseProcess
    from ddpm_dist.diffusion.schedule import Schedule

    network, schedule = network_of(config_of(SIXTEEN)).eval(), Schedule(20)
    attentions = [module for module in network.modules() if isinstance(module, Attention)]
    images = {}
    for dtype in (None, torch.bfloat16):
        process = ReverseProcess(network, schedule, (3, 1, 16, 16), labelled=True, device="cpu", dtype=dtype)
        assert {module.backend for module in attentions} == {attention_cpu.attention if dtype else None}
        images[dtype] = process.run(7, torch.arange(3), torch.arange(3))
    assert 0 < off(images[torch.bfloat16], images[None].double()) < 0.05


# --- the program -----------------------------------------------------------------------------------------------------

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(native.VARIABLE, str(folder))
    (tmp_path / "answer.cpp").write_text(SOURCE)
    return folder


def test_it_is_compiled_once_and_again_when_source_or_flags_change(cache, tmp_path, monkeypatch):
    source = tmp_path / "answer.cpp"
    assert native.load(source, []).answer() == 42
    (made,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("CXX", "false")
    assert native.load(source, []).answer() == 42
    with pytest.raises(native.NotBuilt, match="the C\\+\\+ compiler false does not compile answer.cpp"):
        native.load(source, ["-O1"])
    source.write_text(SOURCE.replace("42", "43"))
    with pytest.raises(native.NotBuilt):
        native.load(source, [])
    monkeypatch.delenv("CXX")
    assert native.load(source, []).answer() == 43 and len(list(cache.iterdir())) == 2 and made.exists()


def test_a_program_that_does_not_load_is_compiled_again(cache, tmp_path):
    """As when a home folder is shared with a system of another kind."""
    native.load(tmp_path / "answer.cpp", ["-O2"])
    (made,) = cache.iterdir()
    made.unlink()  # loaded libraries are not to be written to
    made.write_bytes(b"of another system")
    code = f"from ddpm_dist import native; import pathlib; print(native.load(pathlib.Path({str(tmp_path / 'answer.cpp')!r}), ['-O2']).answer())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.stdout.strip() == "42", done.stderr
    assert made.read_bytes().startswith(b"\x7fELF") and [path.name for path in cache.iterdir()] == [made.name]


def test_a_folder_that_others_can_write_to_is_not_used(cache, tmp_path):
    cache.mkdir()
    cache.chmod(0o777)
    assert native.cache_folder() is None
    assert native.load(tmp_path / "answer.cpp", ["-O1"]).answer() == 42 and not any(cache.iterdir())


def test_a_home_that_cannot_be_used_costs_only_the_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv(native.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert native.cache_folder() == tmp_path / "other/ddpm_dist"


def test_no_compiler_is_a_reason(cache, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.NotBuilt, match=r"there is no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\)"):
        native.load(tmp_path / "answer.cpp", ["-O0"])


def test_several_processes_compile_at_the_same_time(cache, tmp_path):
    code = f"from ddpm_dist import native; import pathlib; print(native.load(pathlib.Path({str(tmp_path / 'answer.cpp')!r}), []).answer())"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["42"] * 3
    assert [path.suffix for path in cache.iterdir()] == [".so"]
