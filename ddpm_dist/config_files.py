"""Configuration files as plain mappings: finding them, ``extends``, overrides, and the parts of YAML that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ddpm_dist.errors import UserError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20


def find_config(source: str | Path) -> Path:
    """A path as given, or the name of a packaged config with or without ``.yaml``."""
    path = Path(source)
    if path.is_file():
        return path
    names = available_configs()
    if path.parent == Path(".") and path.stem in names and path.suffix in ("", ".yaml"):
        return names[path.stem]
    if path.parent.name == "configs" and path.stem in names:  # configs/x.yaml from a folder that is not the checkout
        return names[path.stem]
    raise UserError(f"config file {path} does not exist; packaged ones are: {', '.join(sorted(names))}")


def available_configs() -> dict[str, Path]:
    """The configs that come with the package, by name."""
    here = Path(__file__).parent
    for folder in (here / "configs", here.parent / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def read_yaml(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML mapping as plain data, with ``extends`` resolved. Aliases, duplicate keys and tags are refused."""
    path = path.resolve()
    if path in _seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(map(str, _seen))}")
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"config file {path} is larger than {MAX_BYTES} bytes; this is not a configuration")
    try:
        values = parse_yaml(raw.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"config file {path} is not valid YAML: {str(error) or type(error).__name__}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"config file {path} must hold a mapping of sections, not a {type(values).__name__}")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends must be the path of one other config file")
    parent_path = path.parent / parent
    base = read_yaml(parent_path if parent_path.is_file() else find_config(parent), (*_seen, path))
    return merge(base, values)


def parse_yaml(text: str) -> Any:
    """``yaml.safe_load`` that refuses aliases (a few lines of them can stand for gigabytes) and duplicate keys."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {line}: aliases (*{event.anchor}) are not supported; use extends")
        if depth > MAX_DEPTH:
            raise ValueError(f"line {line}: nested more than {MAX_DEPTH} deep")
    _refuse_duplicates(yaml.compose(text, Loader=yaml.SafeLoader))
    return yaml.safe_load(text)


def _refuse_duplicates(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {key.start_mark.line + 1}: keys must be plain words")
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: key {key.value!r} appears twice")
            seen.add(key.value)
            _refuse_duplicates(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item)


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over each other; where both have a value, that of ``top`` counts."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def apply_override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise UserError(f"{override!r} is not an override: write section.key=value, for example optim.lr=2e-4")
    try:
        value = parse_yaml(text) if text.strip() else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"override {path}: the value is not valid YAML: {error}") from None
    section = values
    for part in parts[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise UserError(f"override {path}: {part} is not a section")
    section[parts[-1]] = value
