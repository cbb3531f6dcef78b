"""Configuration: what is wrong is named by its path, with the closest valid key; files are data and nothing else."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_dist.config import Config, load_config
from ddpm_dist.config_files import available_configs, parse_yaml
from ddpm_dist.continuation import differences
from ddpm_dist.errors import UserError
from ddpm_dist.models import build_model


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean optim.lr?"]),
        ("trian.images=3", ["trian", "did you mean train?"]),
        ("train.lr=1", ["train.lr", "did you mean optim.lr?"]),
        ("train.global_batch=abc", ["train.global_batch", "integer", "'abc'"]),
        ("train.images=true", ["train.images", "integer"]),
        ("train.images=1.5", ["train.images", "integer"]),
        ("train.compile=1", ["train.compile", "boolean"]),
        ("optim.lr=.nan", ["optim.lr", "finite"]),
        ("optim.lr=-1", ["optim.lr", "greater than 0"]),
        ("optim.betas=[0.9]", ["optim.betas"]),
        ("run.name=../outside", ["run.name"]),
        ("data.range=[1, -1]", ["data.range", "below"]),
        ("diffusion.t_min=1000", ["diffusion", "t_min 1000 must be below timesteps 1000"]),
        ("sampling.steps=2000", ["sampling.steps 2000", "1000"]),
        ("train.images", ["section.key=value"]),
        ("images=1", ["section.key=value"]),
        ("train.images.x=1", ["train.images"]),
    ],
)
def test_wrong_overrides_name_key_and_remedy(override, words):
    with pytest.raises(UserError) as error:
        load_config(None, ["train.images=5", override] if override == "train.images.x=1" else [override])
    for word in words:
        assert word in str(error.value), str(error.value)


def test_all_wrong_keys_are_listed_at_once():
    with pytest.raises(UserError) as error:
        load_config(None, ["optim.lrr=1", "train.images=x"])
    assert "optim.lrr" in str(error.value) and "train.images" in str(error.value)


def test_numbers_as_people_write_them():
    config = load_config(
        None, ["optim.lr=3e-4", "train.images=2e6", "train.global_batch=1_024", "ema.half_lives=[1e5, 3]"]
    )
    assert config.optim.lr == 3e-4 and config.train.images == 2_000_000 and config.train.global_batch == 1024
    assert config.ema.half_lives == [1e5, 3.0]


def test_a_file_extends_another_and_overrides_win(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {images: 10, global_batch: 5}\nmodel: {width: 8}\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\ntrain: {images: 20}\n")
    config = load_config(tmp_path / "top.yaml", ["model.width=16"])
    assert (config.train.images, config.train.global_batch, config.model.keywords) == (20, 5, {"width": 16})


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", "twice"),
        ("run: !!python/object/apply:os.system ['touch hacked']\n", "not valid YAML"),
        ("- 1\n", "mapping"),
        ("run: {\n", "not valid YAML"),
        ("extends: self.yaml\n", "extends itself"),
        ("extends: [a]\n", "extends must be"),
        ("run: 3\n", "run"),
        ("[" * 5000, "not valid YAML"),
        ("x: " + "a" * 1_100_000, "larger than"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, text, word, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "self.yaml")
    assert word in str(error.value)
    assert not (tmp_path / "hacked").exists()


def test_a_missing_file_lists_the_packaged_ones():
    with pytest.raises(UserError, match="nope.yaml does not exist.*cifar64.*digits"):
        load_config("nope.yaml")


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_keys = st.sampled_from([(s, k) for s, field in Config.model_fields.items() for k in field.annotation.model_fields])


@given(st.lists(st.tuples(_keys, _values), max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_value_is_taken_or_refused_as_bad_usage(changes):
    from ddpm_dist.config import build_config

    values: dict = {}
    for (section, key), value in changes:
        values.setdefault(section, {})[key] = value
    try:
        config = build_config(values, "test")
    except UserError:
        return
    again = build_config(yaml.safe_load(config.to_yaml()), "again")
    assert again == config


@given(st.text(alphabet="{}[]:,&*!%|>'\"#- \nab1", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_parsed_or_refused(text):
    try:
        parse_yaml(text)
    except (yaml.YAMLError, ValueError):
        pass


@pytest.mark.parametrize("name", sorted(available_configs()))
def test_packaged_configs_are_valid_and_build(name):
    import torch

    from ddpm_dist.models import build_model

    config = load_config(name)
    with torch.device("meta"):
        network = build_model(config.model.name, **config.network_keywords())
    if name == "cifar64":
        assert sum(p.numel() for p in network.parameters()) == 23_335_299
    assert all(config.train.global_batch % ranks == 0 for ranks in (1, 2, 4, 8))


def test_differences_leave_out_what_may_change():
    old, new = load_config("digits").to_dict(), load_config("digits").to_dict()
    new["train"]["images"] = 1
    new["checkpoint"]["every"] = 1
    new["sampling"]["num"] = 1
    new["data"]["shards"] = "elsewhere"
    assert differences(old, new) == []
    new["optim"]["lr"] = 1.0
    new["model"]["extra"] = 1
    assert differences(old, new) == [
        "model.extra: (not set) in the checkpoint, 1 now", "optim.lr: 0.001 in the checkpoint, 1.0 now",
    ]  # fmt: skip


def test_contradictions_between_model_and_data():
    with pytest.raises(UserError, match="model.num_classes=5 contradicts"):
        load_config(None, ["model.num_classes=5", "data.num_classes=10"]).network_keywords()
    for name in ("unet", "film_unet", "basic_unet"):  # what has no labels says so when it is built
        config = load_config(None, [f"model.name={name}", "data.num_classes=10"])
        with pytest.raises(UserError, match=f'"{name}" has no labels, but num_classes=10'):
            build_model(name, **config.network_keywords())
    with pytest.raises(UserError, match="model.timesteps=7 contradicts"):
        load_config(None, ["model.name=context_unet", "model.timesteps=7"]).network_keywords()


def test_credentials_stay_out_of_records():
    config = load_config(None, ["tracking.uri=https://me:secret@server/mlflow"])
    assert config.tracking.uri == "https://me:secret@server/mlflow"
    assert "secret" not in config.to_yaml() and "https://server/mlflow" in config.to_yaml()
