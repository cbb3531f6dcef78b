"""What images are generated from: the newest checkpoint of a run, a checkpoint, or a weights file; a configuration for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ddpm_dist.checkpoint.find import held_open, is_checkpoint, newest_intact, run_of
from ddpm_dist.checkpoint.format import MANIFEST, Damaged, Reader
from ddpm_dist.config import Data, Diffusion, Sampling, Section, load_config
from ddpm_dist.config_files import available_configs
from ddpm_dist.data.index_file import file_sha256
from ddpm_dist.diffusion import Schedule
from ddpm_dist.errors import UserError
from ddpm_dist.models import build_model
from ddpm_dist.models.weights import load_described


@dataclass
class Source:
    """A network ready to sample and what is known of it."""

    network: nn.Module
    schedule: Schedule
    value_range: list[float]
    shape: tuple[int, int, int]
    num_classes: int | None
    classes: list[str] | None
    sampling: dict[str, Any]  # how the run makes its previews, the defaults here
    title: str
    place: Path  # the checkpoint folder or the file that the weights were read from
    sha256: str  # of the file or the checkpoint's manifest: equal for a copy elsewhere
    data: Data  # the images it was trained on, as far as known


@dataclass(frozen=True)
class Process:
    """What is known without weights: the forward process and the images it starts from."""

    schedule: Schedule
    data: Data
    num_classes: int | None
    classes: list[str] | None
    title: str


def open_source(path: Path, ema: int | None) -> Source:
    """A run directory (newest intact checkpoint), a checkpoint folder or a weights file. UserError with the remedy."""
    if path.suffix in (".yaml", ".yml") and path.is_file():
        raise UserError(f"{path} is a configuration, without weights: only --forward-process works with one")
    if path.is_file():
        network, says = load_described(path)
        shape = (network.in_channels, network.image_size, network.image_size)
        value_range = says.diffusion.get("range", [-1.0, 1.0])
        return Source(
            network, schedule_of(says.diffusion), value_range, shape, network.num_classes, says.classes,
            _sampling(says.sampling), path.name, path, file_sha256(path), _data_of_file(shape, network.num_classes, value_range),
        )  # fmt: skip
    return _from_checkpoint(held_open(path) if is_checkpoint(path) else newest_intact(path), path, ema)


def _from_checkpoint(reader: Reader, path: Path, ema: int | None) -> Source:
    try:
        return _build(reader, path, ema)
    except (Damaged, OSError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {reader.folder} cannot be used: {type(error).__name__}: {error}") from None


def _build(reader: Reader, path: Path, ema: int | None) -> Source:
    state = reader.state
    keywords = state["model"]["keywords"]
    network = build_model(state["model"]["name"], **keywords)
    _load_parameters(network, reader, ema)
    data = state["config"]["data"]
    shape = (data["channels"], data["image_size"], data["image_size"])
    title = f"{run_of(path).name} step {reader.step}"
    return Source(
        network, schedule_of(state["config"]["diffusion"]), data["range"], shape, data["num_classes"], state["classes"],
        _sampling(state["config"]["sampling"]), title, reader.folder, file_sha256(reader.folder / MANIFEST),
        _described(Data, data),
    )  # fmt: skip


def _data_of_file(shape: tuple[int, int, int], num_classes: int | None, value_range: list[float]) -> Data:
    """What a weights file lets one know of its images; those that are not square are cut rather than squashed."""
    values = {"channels": shape[0], "image_size": shape[1], "num_classes": num_classes, "range": value_range}
    return _described(Data, {**values, "crop": "center"})


def open_process(path: Path) -> Process:
    """The forward process of a run directory (also of one without a checkpoint), a checkpoint folder, a weights file, or a
    configuration by path or name. UserError with the remedy."""
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        source = open_source(path, None)
        return Process(source.schedule, source.data, source.num_classes, source.classes, source.title)
    folder = run_of(path) if path.is_dir() else None
    if folder is not None and not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} holds no config.yaml: give a run directory, a weights file or a configuration")
    if folder is None and not path.is_file() and path.stem not in available_configs():
        raise UserError(
            f"{path} does not exist: give a run directory, a checkpoint folder, a weights file, a configuration file or one of "
            f"{', '.join(sorted(available_configs()))}"
        )
    config = load_config(folder / "config.yaml" if folder is not None else path)
    schedule = schedule_of({**config.diffusion.model_dump(), "range": config.data.range})
    return Process(schedule, config.data, config.data.num_classes, None, folder.name if folder else path.stem)


def schedule_of(values: dict[str, Any]) -> Schedule:
    """The schedule that a file describes. UserError for a description that is none, or of another kind of prediction."""
    d = _described(Diffusion, values)
    _described(Data, {"range": values.get("range", [-1.0, 1.0])})
    return Schedule.from_mapping(d.model_dump())


def _sampling(values: dict[str, Any]) -> dict[str, Any]:
    """The sampling defaults that a file describes, none if it does not. UserError for values that are none."""
    return {key: value for key, value in _described(Sampling, values).model_dump().items() if key in values}


def _described(section: type[Section], values: dict[str, Any]) -> Any:
    try:
        return section.model_validate({key: value for key, value in values.items() if key in section.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"the diffusion process this file describes cannot be sampled: {'.'.join(map(str, first['loc']))}: {first['msg']} "
            f"(got {first['input']!r:.60}); convert or export it again"
        ) from None


def _load_parameters(network: nn.Module, reader: Reader, ema: int | None) -> None:
    prefix = "model/" if ema is None else f"ema.{ema}/"
    names = reader.names(prefix)
    if not names:
        count = len({name.split("/")[0] for name in reader.names("ema.")})
        raise UserError(f"--ema {ema}: checkpoint {reader.folder} has {count} averages, 0..{count - 1} (or none)")
    values = {name.removeprefix(prefix): reader.tensor(name) for name in names}
    values.update({name.removeprefix("buffer/"): reader.tensor(name) for name in reader.names("buffer/")})
    network.load_state_dict(values)


def choose_classes(classes: str | None, source: Source) -> list[int] | None:
    """The numbers of the asked classes (all if None); None for an unlabelled network. UserError for unknown ones."""
    if source.num_classes is None:
        if classes:
            raise UserError(f"--classes {classes}: {source.title} was trained without labels; leave --classes out")
        return None
    names = source.classes or [str(i) for i in range(source.num_classes)]
    chosen = []
    for word in classes.split(",") if classes else [str(i) for i in range(source.num_classes)]:
        word = word.strip()
        if word in names:  # a name goes before a number: classes may be called 0, 1, 10, 2
            chosen.append(names.index(word))
        elif _is_number(word) and int(word) < source.num_classes:
            chosen.append(int(word))
        else:
            listed = ", ".join(f"{i}" if n == str(i) else f"{i} ({n})" for i, n in enumerate(names[:40]))
            raise UserError(f"--classes: unknown class {word!r}; {source.title} knows {listed}")
    return chosen


def choose_labels(classes: str | None, num: int, source: Source) -> Tensor | None:
    """(num,) int64 labels that cycle through the asked classes; None for an unlabelled network. UserError for unknown ones."""
    chosen = choose_classes(classes, source)
    return None if chosen is None else torch.tensor(chosen)[torch.arange(num) % len(chosen)]


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 10
