"""Parsing of configuration files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recis_hybrid.app.config.core_yaml import read_yaml
from recis_hybrid.app.config.parse import ConfigError, kind_of, parse, show_value
from recis_hybrid.app.config.schema import Config, is_url


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Paths in the file are relative to its folder, those in overrides to the current directory. ``~`` is the home
    directory.

    Args:
        path: A YAML file, read with the core schema of YAML 1.2.
        overrides: Strings ``a.b=value``, with the value in YAML. The last one for a key takes effect.

    Raises:
        ConfigError: The file cannot be read, a key is unknown or missing, or a value has the wrong type.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except IsADirectoryError as error:
        there = path / "config.yaml"
        hint = f"; did you mean {there}?" if there.is_file() else ""
        raise ConfigError(f"{path}: must be a YAML file, but is a folder{hint}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_config(raw, str(path), path.parent, overrides)


def parse_config(raw: bytes, where: str, folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration in the bytes of a file; see :func:`load_config`.

    Args:
        raw: Content of the file.
        where: Name of the file in error messages.
        folder: Base of relative paths in the file.
        overrides: As for :func:`load_config`.

    Raises:
        ConfigError: As for :func:`load_config`.
    """
    try:
        tree = read_yaml(raw, where)
    except yaml.YAMLError as error:
        hint = "\nindent with spaces" if "'\\t'" in str(error) else ""
        raise ConfigError(f"{where}: cannot be read as YAML: {error}{hint}") from error
    if tree is None:
        raise ConfigError(f"{where}: the file is empty; `recis-hybrid init` writes a starter configuration")
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: must be a mapping of keys, got a {kind_of(tree)}")
    _resolve(tree, folder)
    for override in overrides:
        _override(tree, override)
    _resolve(tree, Path())
    return parse(Config, tree, where)


def _resolve(tree: Mapping[str, Any], folder: Path) -> None:
    """Resolve relative paths in place, and leave values of the wrong type to :func:`parse`."""

    def resolve(mapping: Any, key: str) -> None:
        if not isinstance(mapping, dict):
            return
        value = mapping.get(key)
        if isinstance(value, str):
            mapping[key] = resolved(value)
        elif isinstance(value, list):
            mapping[key] = [resolved(each) if isinstance(each, str) else each for each in value]

    def resolved(text: str) -> str:
        return text if not text or is_url(text) else os.path.normpath(folder / Path(text).expanduser())

    resolve(tree, "run")
    resolve(tree.get("data"), "train")
    resolve(tree.get("data"), "evaluate")
    features = tree.get("features")
    for feature in features.values() if isinstance(features, dict) else ():
        ops = feature.get("ops") if isinstance(feature, dict) else None
        for op in ops if isinstance(ops, list) else ():
            vocabulary = op.get("vocabulary") if isinstance(op, dict) else None
            if isinstance(vocabulary, dict) and isinstance(vocabulary.get("source"), str):
                resolve(vocabulary, "source")


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: must be KEY=VALUE, such as train.epochs=3")
    try:
        value = read_yaml(text, key)
    except yaml.YAMLError as error:
        quoted = text.replace("'", "''")
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML; put a string in quotes that the shell preserves, "
            f"{key}=\"'{quoted}'\": {error}"
        ) from error
    parts, position = key.split("."), 0
    while True:
        # A name, such as that of a feature, may contain dots.
        names = {stop: ".".join(parts[position:stop]) for stop in range(len(parts), position, -1)}
        position = next((stop for stop, name in names.items() if name in tree), position + 1)
        name = names[position]
        if position == len(parts):
            tree[name] = value
            return
        if tree.get(name) is None:
            tree[name] = {}
        if not isinstance(tree[name], dict):
            raise ConfigError(f"override {override!r}: {name} is {show_value(tree[name])}, which has no keys")
        tree = tree[name]
