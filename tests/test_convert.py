import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.reference import ReferenceUNet
from ddpm_dist.convert import main
from ddpm_dist.models import load_weights
from ddpm_dist.originals import ORIGINALS


def original(classes=4, width=8, size=16, seed=0):
    """The original program's network with every parameter away from its initial value (norms start as identities)."""
    torch.manual_seed(seed)
    network = ReferenceUNet(num_classes=classes, width=width, image_size=size).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * p.std().nan_to_num(1.0).clamp(min=0.05) * torch.randn_like(p))
    return network


def run(source, out, *more):
    return main([str(source), "--out", str(out), *map(str, more)])


@pytest.fixture
def state():
    return original().state_dict()


@pytest.mark.parametrize(("model", "classes"), [("unet_conditional", 10), ("unet", None)])
def test_converted_flagship_computes_what_the_original_computed(tmp_path, model, classes):
    theirs = original(classes, width=64, size=64)
    torch.save(theirs.state_dict(), tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "weights.safetensors", "--model", model) == 0
    ours, diffusion = load_weights(tmp_path / "weights.safetensors")
    assert diffusion == ORIGINALS[model].diffusion
    x, t = torch.randn(2, 3, 64, 64), torch.tensor([1, 999])
    with torch.no_grad():
        for y in [torch.tensor([3, 9]), None] if classes else [None]:
            expected = theirs(x, t, y)
            assert expected.abs().max() > 0.5
            torch.testing.assert_close(ours(x, t, y), expected, atol=1e-5, rtol=1e-5)
            assert torch.allclose(ours(x, t, None), expected, atol=1e-5) == (y is None)


def test_metadata_names_network_keywords_and_process(tmp_path, state, capsys):
    torch.save(state, tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", "image_size=16") == 0
    with safe_open(str(tmp_path / "w.safetensors"), "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "ddpm_dist.model"
    assert metadata["version"] == "1"
    assert '"num_classes": 4' in metadata["model"]
    assert '"image_size": 16' in metadata["model"]
    assert '"width": 8' in metadata["model"]
    assert '"t_min": 1' in metadata["diffusion"]
    assert "width=8" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "w.safetensors"]


WRAPPINGS = {
    "plain": lambda s: s,
    "module": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "ema_model": lambda s: {f"ema_model.{k}": v for k, v in s.items()},
    "averaged": lambda s: {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in s.items()}},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "lr": 1e-3},
    "model": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "step": torch.tensor(3)},
    "nested": lambda s: {"ema": {"state_dict": s}},
    "half": lambda s: {k: v.half() for k, v in s.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_state_dicts_are_found_under_wrappers_and_prefixes(tmp_path, state, wrapping):
    torch.save(WRAPPINGS[wrapping](state), tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors") == 0
    network, _ = load_weights(tmp_path / "w.safetensors")
    tolerance = 1e-2 if wrapping == "half" else 0
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, state[name], atol=tolerance, rtol=tolerance)


def test_of_several_state_dicts_one_must_be_chosen(tmp_path, state, capsys):
    other = {name: value + 1 for name, value in state.items()}
    torch.save({"model": state, "ema": other}, tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors") == 2
    assert "--key model | ema" in capsys.readouterr().err
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", "--key", "ema") == 0
    network, _ = load_weights(tmp_path / "w.safetensors")
    assert torch.equal(network.outc.bias, other["outc.bias"])
    assert run(tmp_path / "ckpt.pt", tmp_path / "x.safetensors", "--key", "none") == 2
    assert "no dict named 'none'" in capsys.readouterr().err


def poison(state):
    state["outc.bias"][1] = float("inf")
    return state


WRONG = {
    "another network": (lambda s: {"fc.weight": torch.ones(2, 2)}, "fc.weight: [2, 2] in the file, unknown"),
    "a missing tensor": (
        lambda s: {k: v for k, v in s.items() if k != "bot2.double_conv.1.bias"},
        "bot2.double_conv.1.bias: missing, the network has [64]",
    ),
    "another shape": (
        lambda s: {**s, "outc.bias": torch.ones(5)},
        "outc.bias: [5] in the file, [3] in the network",
    ),
    "an optimizer": (lambda s: {"state": {0: {"step": 3}}, "param_groups": []}, "holds no state dict"),
    "a list": (lambda s: [s], "it holds a list"),
    "nothing": (lambda s: {}, "holds no state dict"),
    "a value that is not finite": (poison, "outc.bias holds values that are not finite"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused_with_the_difference(tmp_path, state, capsys, kind):
    change, message = WRONG[kind]
    torch.save(change(state), tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_an_object_in_the_file_is_named_without_advice_to_trust_it(tmp_path, state, capsys):
    torch.save({**state, "epoch": Path("7")}, tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors") == 2
    error = capsys.readouterr().err
    assert "holds more than tensors (pathlib." in error and "save the network's state_dict() alone" in error
    assert "weights_only" not in error and "trust" not in error


def test_the_process_is_said_and_can_be_changed(tmp_path, state, capsys):
    torch.save(state, tmp_path / "ckpt.pt")
    out = tmp_path / "w.safetensors"
    assert run(tmp_path / "ckpt.pt", out) == 0
    assert "trained with timesteps=1000, t_min=1, schedule=linear" in capsys.readouterr().out
    assert run(tmp_path / "ckpt.pt", out, "--force", "diffusion.timesteps=250", "diffusion.schedule=cosine") == 0
    assert "timesteps=250, t_min=1, schedule=cosine" in capsys.readouterr().out
    _, diffusion = load_weights(out)
    assert (diffusion["timesteps"], diffusion["schedule"]) == (250, "cosine")
    for word, says in (
        ("diffusion.steps=9", "diffusion.steps: there is no such key"),
        ("diffusion.t_min=2000", "t_min"),
    ):
        assert run(tmp_path / "ckpt.pt", tmp_path / "other.safetensors", word) == 2
        assert says in capsys.readouterr().err and not (tmp_path / "other.safetensors").exists()


def test_labelled_weights_are_not_taken_for_unlabelled_ones(tmp_path, state, capsys):
    torch.save(state, tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", "--model", "unet") == 2
    assert "use --model unet_conditional" in capsys.readouterr().err


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, state, capsys, zipped):
    marker = tmp_path / "ran"
    torch.save({**state, "extra": Payload(marker)}, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=zipped)
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors") == 2
    assert "could run code" in capsys.readouterr().err
    assert not marker.exists()
    torch.load(tmp_path / "ckpt.pt", weights_only=False)  # the payload is armed
    assert marker.exists()


def test_damaged_and_foreign_files_are_refused(tmp_path, state, capsys):
    path = tmp_path / "ckpt.pt"
    torch.save(state, path)
    whole = path.read_bytes()
    contents = [whole[: len(whole) // 2], b"", b"not a checkpoint", pickle.dumps({"a": 1}), b"\x80\x04", b"PK\x03\x04"]
    for content in contents:
        path.write_bytes(content)
        assert run(path, tmp_path / "w.safetensors") == 2, content[:20]
        assert "ckpt.pt" in capsys.readouterr().err
    assert run(tmp_path / "absent.pt", tmp_path / "w.safetensors") == 2
    assert "no such file" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_an_existing_output_is_kept_unless_forced(tmp_path, state, capsys):
    torch.save(state, tmp_path / "ckpt.pt")
    out = tmp_path / "w.safetensors"
    out.write_text("mine")
    assert run(tmp_path / "ckpt.pt", out) == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert run(tmp_path / "ckpt.pt", out, "--force") == 0
    load_weights(out)
    assert run(tmp_path / "ckpt.pt", tmp_path / "ckpt.pt", "--force") == 2
    assert run(tmp_path / "ckpt.pt", tmp_path / "absent" / "w.safetensors") == 2
    assert "does not exist" in capsys.readouterr().err
    torch.load(tmp_path / "ckpt.pt", weights_only=True)


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("heads", "'heads' is not a keyword"),
        ("heads=x", "'heads=x' is not a keyword"),
        ("hads=2", "did you mean 'heads'"),
    ],
)
def test_a_wrong_keyword_is_refused(tmp_path, state, capsys, keyword, message):
    torch.save(state, tmp_path / "ckpt.pt")
    assert run(tmp_path / "ckpt.pt", tmp_path / "w.safetensors", keyword) == 2
    assert message in capsys.readouterr().err


def test_runs_as_a_module(tmp_path, state):
    torch.save(state, tmp_path / "ckpt.pt")
    command = [sys.executable, "-m", "ddpm_dist.convert", "ckpt.pt", "--out", "w.safetensors"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    load_weights(tmp_path / "w.safetensors")
