"""Our attention for CPUs with AVX-512: as exact as torch's, the same on any number of threads, and only where it can run."""

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

needs_avx512 = pytest.mark.skipif(not attention_cpu.HAS_AVX512, reason="this processor has no AVX-512 instructions")
needs_bf16 = pytest.mark.skipif(not attention_cpu.HAS_BF16, reason="this processor has no AVX-512 BF16 instructions")
F32, B16 = torch.float32, torch.bfloat16
both_types = pytest.mark.parametrize(
    "dtype", [pytest.param(F32, marks=needs_avx512, id="fp32"), pytest.param(B16, marks=needs_bf16, id="bf16")]
)
# Times torch's distance from float64, and a distance beside which that does not matter.
ALLOWED = {F32: (3.0, 3e-7), B16: (1.1, 0.003)}
SIXTEEN = "model.width=32"  # heads of 16 in the tiny network
LARGE = (SIXTEEN, "data.image_size=64")  # over 1,024 tokens
BF16 = (SIXTEEN, "train.precision=bf16")


def by_torch(qkv):
    return attend(qkv, None)


def both(function, qkv, gradient):
    """Output and gradient."""
    leaf = qkv.detach().clone().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, gradient)[0]


def off(found, exact):
    return float((found.detach().double() - exact.detach().double()).norm() / exact.detach().norm().clamp(min=1e-30))


def numbers(*shape, dtype, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@both_types
@pytest.mark.parametrize("width", attention_cpu.WIDTHS)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63, 64, 65, 129, 256, 1000, 3000])
def test_output_and_gradients_are_as_exact_as_torch_s(tokens, width, dtype):
    batch, heads = (2, 3) if tokens < 3000 else (1, 1)
    qkv = numbers(batch, tokens, 3, heads, width, scale=1.5, dtype=dtype)
    gradient = numbers(batch, tokens, heads, width, seed=1, dtype=dtype)
    exact = both(by_torch, qkv.double(), gradient.double())
    ours, theirs = both(attention_cpu.attention, qkv, gradient), both(by_torch, qkv, gradient)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == right.shape
        factor, least = ALLOWED[dtype]
        assert off(mine, right) <= factor * off(other, right) + least


@both_types
@pytest.mark.parametrize("shift", [0.0, 25.0, -25.0])
def test_scores_of_hundreds_neither_overflow_nor_vanish(shift, dtype):
    """Scores from about -5,000 to 5,000, or all far above or below 0 (queries and keys share a direction)."""
    qkv = numbers(1, 77, 3, 2, 16, scale=40.0, dtype=dtype)
    if shift:
        qkv = numbers(1, 77, 3, 2, 16, dtype=dtype)
        qkv[:, :, 0] += abs(shift)
        qkv[:, :, 1] += shift
    gradient = numbers(1, 77, 2, 16, seed=1, dtype=dtype)
    exact = both(by_torch, qkv.double(), gradient.double())
    for mine, right in zip(both(attention_cpu.attention, qkv, gradient), exact, strict=True):
        assert mine.isfinite().all() and off(mine, right) < {F32: 2e-3, B16: 0.02}[dtype]


@both_types
@pytest.mark.parametrize("scale", [100.0, 150.0, 300.0])
def test_with_enormous_scores_the_largest_alone_counts(scale, dtype):
    """Weights of 0 and 1; the difference to the largest score has to be taken before it is rounded."""
    qkv = numbers(1, 70, 3, 2, 16, scale=scale, dtype=dtype)
    gradient = numbers(1, 70, 2, 16, seed=1, dtype=dtype)
    exact = both(by_torch, qkv.double(), gradient.double())
    ours, theirs = both(attention_cpu.attention, qkv, gradient), both(by_torch, qkv, gradient)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert off(mine, right) <= 3 * off(other, right) + ALLOWED[dtype][1]


@both_types
def test_the_result_depends_neither_on_threads_nor_on_the_rest_of_the_batch(dtype):
    qkv, gradient = numbers(3, 200, 3, 2, 32, dtype=dtype), numbers(3, 200, 2, 32, seed=1, dtype=dtype)
    whole, before = both(attention_cpu.attention, qkv, gradient), torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 64):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, both(attention_cpu.attention, qkv, gradient), whole))
            one = both(attention_cpu.attention, qkv[1:2], gradient[1:2])
            assert all(torch.equal(a, b[1:2]) for a, b in zip(one, whole, strict=True))
    finally:
        torch.set_num_threads(before)


@both_types
def test_layouts_that_are_not_contiguous(dtype):
    qkv = numbers(2, 3, 40, 4, 16, dtype=dtype).transpose(1, 2)
    gradient = numbers(2, 4, 40, 16, seed=1, dtype=dtype).transpose(1, 2)
    assert not qkv.is_contiguous() and not gradient.is_contiguous()
    mine = both(attention_cpu.attention, qkv, gradient)
    other = both(attention_cpu.attention, qkv.contiguous(), gradient.contiguous())
    assert all(map(torch.equal, mine, other))


@both_types
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_what_is_not_finite_stays_visible(value, part, dtype):
    """The guard against non-finite steps looks at what comes out."""
    qkv = numbers(1, 80, 3, 1, 16, dtype=dtype)
    qkv[0, 70, part, 0, 3] = value
    out, gradient = both(attention_cpu.attention, qkv, numbers(1, 80, 1, 16, seed=1, dtype=dtype))
    assert not gradient.isfinite().all()
    if value != value or part == 2:
        assert not out[0, 70].isfinite().all()


@both_types
def test_an_empty_batch(dtype):
    qkv, gradient = numbers(0, 64, 3, 4, 16, dtype=dtype), numbers(0, 64, 4, 16, dtype=dtype)
    out, found = both(attention_cpu.attention, qkv, gradient)
    assert out.shape == (0, 64, 4, 16) and found.shape == (0, 64, 3, 4, 16)


@both_types
def test_it_is_an_operation_that_torch_can_trace(dtype):
    qkv = numbers(1, 33, 3, 2, 16, dtype=dtype).requires_grad_()
    results = torch.library.opcheck(torch.ops.ddpm_dist.attention_avx512.default, (qkv,))
    assert set(results.values()) == {"SUCCESS"}


@needs_avx512
def test_a_compiled_network_calls_it(monkeypatch):
    torch.manual_seed(0)
    module = Attention(64, 4)
    module.backend = attention_cpu.WHERE_IT_PAYS[F32]
    x = torch.randn(1, 1024, 64)
    eager = module(x)
    (expected,) = torch.autograd.grad(eager.square().sum(), module.in_proj_weight)
    called = []
    for name in ("_forward", "_backward"):
        real = getattr(attention_cpu, name)
        monkeypatch.setattr(attention_cpu, name, lambda *a, name=name, real=real: called.append(name) or real(*a))
    out = torch.compile(module, fullgraph=True)(x)
    (found,) = torch.autograd.grad(out.square().sum(), module.in_proj_weight)
    assert called == ["_forward", "_backward"]
    assert off(out, eager) < 1e-5 and off(found, expected) < 1e-5


@needs_avx512
def test_other_heads_are_an_error_and_other_numbers_go_to_torch():
    with pytest.raises(RuntimeError, match="heads have 16, 32, 64 features"):
        attention_cpu.attention(numbers(1, 8, 3, 2, 24, dtype=F32))
    with pytest.raises(ValueError, match=r"takes \(B, N, 3, heads, D\)"):
        attention_cpu.attention(torch.zeros(1, 8, 2, 2, 16))
    with pytest.raises(native.NotBuilt, match="for float32 and bfloat16, not torch.float64"):
        attention_cpu.attention(torch.zeros(1, 8, 3, 2, 16, dtype=torch.float64))
    qkv = numbers(1, 8, 3, 2, 16, dtype=torch.float64)
    for backend in (*attention_cpu.ALWAYS.values(), *attention_cpu.WHERE_IT_PAYS.values()):
        assert torch.equal(attend(qkv, backend), attend(qkv, None))


@needs_avx512
def test_the_rule_is_applied_to_each_shape(monkeypatch):
    seen = []
    monkeypatch.setattr(attention_cpu, "attention", lambda qkv: seen.append(tuple(qkv.shape)) or qkv[:, :, 0])
    for tokens, width in ((1024, 16), (1023, 16), (1024, 32), (1024, 64)):
        assert attend(numbers(1, tokens, 3, 1, width, dtype=F32), attention_cpu.WHERE_IT_PAYS[F32]).shape == (
            1,
            tokens,
            1,
            width,
        )
    assert seen == [(1, 1024, 3, 1, 16), (1, 1024, 3, 1, 32)]
    monkeypatch.setattr(attention_cpu, "HAS_BF16", True)
    assert attention_cpu.pays(4, 64, B16) and not attention_cpu.pays(4096, 24, B16)
    monkeypatch.setattr(attention_cpu, "HAS_AMX", True)
    assert not attention_cpu.pays(4096, 16, B16) and attention_cpu.pays(4096, 16, F32)
    monkeypatch.setattr(attention_cpu, "HAS_BF16", False)
    monkeypatch.setattr(attention_cpu, "HAS_AVX512", False)
    assert not any(attention_cpu.pays(4096, 16, dtype) for dtype in (F32, B16))
    assert attention_cpu.why_not(F32) == "this processor has no AVX-512 instructions"


@both_types
def test_auto_chooses_it_where_it_can_run(alone, monkeypatch, capsys, dtype):
    from test_attention_backends import config_of, network_of

    paying = (*LARGE, f"train.precision={'bf16' if dtype == B16 else 'fp32'}")
    monkeypatch.setattr(attention_cpu, "HAS_AMX", False)

    def chosen(*overrides):
        config = config_of(*overrides)
        network = network_of(config)
        recorded = backends.pin(network, config, 4, alone)
        assert bool(recorded) == (config.train.attention != "auto")  # what a rule decides is not kept in the checkpoint
        return {module.backend for module in network.modules() if isinstance(module, Attention)}

    assert chosen(*paying) == {attention_cpu.WHERE_IT_PAYS[dtype]}
    assert chosen("train.precision=bf16") == chosen() == {None}  # heads of 2
    assert chosen(SIXTEEN) == {None}  # few tokens
    assert chosen(*paying, "train.attention=avx512") == {attention_cpu.ALWAYS[dtype]}
    with pytest.raises(UserError, match="avx512 is for heads of 16, 32, 64 features"):
        chosen("train.attention=avx512")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(attention_cpu, "_answer", lambda dtype: "there is no C++ compiler")
    assert chosen(*paying) == {None}
    assert "attention: torch's own, slower here than avx512" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"avx512 is not possible: there is no C\+\+ compiler; use"):
        chosen(*paying, "train.attention=avx512")


@both_types
def test_the_network_computes_the_same_with_it(alone, dtype):
    from test_attention_backends import config_of, network_of

    config = config_of(SIXTEEN, "train.attention=avx512", f"train.precision={'bf16' if dtype == B16 else 'fp32'}")
    networks = {"torch": network_of(config), "ours": network_of(config)}
    backends.pin(networks["ours"], config, 4, alone)
    x, t, y = torch.randn(4, 1, 16, 16), torch.arange(4), torch.arange(4)
    exact = network_of(config).double()
    right = exact(x.double(), t, y)
    right.square().mean().backward()
    found = {}
    for name, network in networks.items():
        with torch.autocast("cpu", B16, enabled=dtype == B16):
            out = network(x, t, y)
        out.float().square().mean().backward()
        mine, expected = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (network, exact))
        found[name] = (off(out, right), off(mine, expected))
    assert found["ours"][0] != found["torch"][0]
    assert all(ours < 1.5 * torchs + 1e-7 for ours, torchs in zip(found["ours"], found["torch"], strict=True)), found


@needs_avx512
def test_a_real_run_with_it_resumes_to_the_bit_and_follows_the_one_without(tmp_path):
    dtype = B16 if attention_cpu.HAS_BF16 else F32
    audit = ("train.audit=true", "train.audit_params_every=1", "optim.decay_images=96")
    audit += BF16 if dtype == B16 else (SIXTEEN,)
    for images in (48, 96):
        result = train(tmp_path / "cut", f"train.images={images}", "train.attention=avx512", *audit, ranks=2)
        assert result.returncode == 0, result.stdout + result.stderr
    for kind in ("avx512", "flash"):
        result = train(tmp_path / kind, "train.images=96", *audit, f"train.attention={kind}", ranks=2)
        assert result.returncode == 0, result.stdout + result.stderr
    cut, whole, other = (lines(tmp_path / name / "audit.jsonl") for name in ("cut", "avx512", "flash"))
    assert cut == whole and cut != other
    losses = [[record["loss"] for record in lines(tmp_path / name / "metrics.jsonl")] for name in ("avx512", "flash")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02 if dtype == B16 else 1e-5)


@needs_avx512
def test_without_a_compiler_training_goes_on_and_says_so(tmp_path):
    nothing = {"CXX": "/nowhere/c++", "DDPM_DIST_CACHE": str(tmp_path / "cache")}
    result = train(tmp_path / "run", "train.images=12", *LARGE, ranks=2, **nothing)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("attention: torch's own") == 1 and "/nowhere/c++ cannot be run" in result.stdout
    result = train(tmp_path / "small", "train.images=12", **nothing)
    assert result.returncode == 0 and "attention:" not in result.stdout  # what would not pay is not missed


@needs_avx512
def test_a_rank_that_cannot_is_told_by_every_rank(tmp_path):
    """avx512 by name ends the run with advice; auto goes on with torch's on all ranks."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nif [ "$RANK" = 1 ]; then echo "error: no licence" >&2; exit 3; fi\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    open_to_all = tmp_path / "cache"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)  # so nothing is kept, and each rank compiles
    extra = {"CXX": str(compiler), "DDPM_DIST_CACHE": str(open_to_all)}
    named = train(tmp_path / "named", "train.images=12", *LARGE, "train.attention=avx512", ranks=2, **extra)
    assert named.returncode != 0 and "no licence; use train.attention=auto" in named.stderr
    assert "NotBuilt" not in named.stderr
    assert not (tmp_path / "named").exists()
    auto = train(tmp_path / "auto", "train.images=12", *LARGE, ranks=2, **extra)
    assert auto.returncode == 0 and auto.stdout.count("attention: torch's own") == 1 and "no licence" in auto.stdout


@both_types
def test_sampling_uses_it_where_it_pays_and_gives_the_same_images(monkeypatch, dtype):
    from test_attention_backends import config_of, network_of

    from ddpm_dist.diffusion.reverse import ReverseProcess
    from ddpm_dist.diffusion.schedule import Schedule

    monkeypatch.setattr(attention_cpu, "HAS_AMX", False)
    network, schedule = network_of(config_of(*LARGE)).eval(), Schedule(20)
    attentions = [module for module in network.modules() if isinstance(module, Attention)]
    images = []
    for own in (False, True):
        with monkeypatch.context() as patch:
            if not own:
                patch.setattr(attention_cpu, "_answer", lambda dtype: "not now")
            process = ReverseProcess(
                network, schedule, (2, 1, 64, 64), sampler="ddim", steps=4, labelled=True, device="cpu",
                dtype=None if dtype == F32 else B16,
            )  # fmt: skip
        assert {module.backend for module in attentions} == {attention_cpu.WHERE_IT_PAYS[dtype] if own else None}
        images.append(process.run(7, torch.arange(2), torch.arange(2)))
    assert 0 < off(images[1], images[0]) < {F32: 1e-5, B16: 0.02}[dtype]


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


@pytest.mark.parametrize("left", [0, 4096, 8192, -1])
def test_a_program_that_was_cut_short_is_compiled_again(cache, tmp_path, left):
    """The system would load it, and kill the process when it runs into what is missing."""
    source = tmp_path / "answer.cpp"
    source.write_text(SOURCE + "\n".join(f'extern "C" const char* t{i}() {{ return "{i:0500}"; }}' for i in range(100)))
    native.load(source, ["-O2"])
    (made,) = cache.iterdir()
    whole = made.read_bytes()
    made.unlink()
    made.write_bytes(whole[:left])
    made.chmod(0o600)
    code = f"from ddpm_dist import native; import pathlib; print(native.load(pathlib.Path({str(source)!r}), ['-O2']).answer())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.stdout.strip() == "42", done.stderr
    assert made.read_bytes() == whole


def test_a_program_that_others_could_have_written_is_compiled_again(cache, tmp_path, monkeypatch):
    native.load(tmp_path / "answer.cpp", ["-O3"])
    (made,) = cache.iterdir()
    assert made.stat().st_mode & 0o777 == 0o600
    made.chmod(0o666)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(native.NotBuilt, match="does not compile answer.cpp: exit code 1"):
        native.load(tmp_path / "answer.cpp", ["-O3"])


def test_a_cache_that_became_read_only_costs_only_the_cache(cache, tmp_path, monkeypatch):
    cache.mkdir(mode=0o700)

    def refused(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(native.tempfile, "mkstemp", refused)
    assert native.load(tmp_path / "answer.cpp", ["-g"]).answer() == 42


def test_no_place_for_temporary_files_is_a_reason(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(native.NotBuilt, match="no C.. can be compiled here"):
        native.load(tmp_path / "answer.cpp", ["-g1"])


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
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(native.NotBuilt, match="No closing quotation"):
        native.load(tmp_path / "answer.cpp", ["-O0"])
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
