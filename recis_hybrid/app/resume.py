"""Configurations of resumed runs: allowed changes, and the record in the run's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recis_hybrid import distributed
from recis_hybrid.app.config import Config, ConfigError, is_url, parse_config
from recis_hybrid.app.config.core_yaml import write_yaml
from recis_hybrid.pipelines.callback import Callback
from recis_hybrid.pipelines.stages import Run
from recis_hybrid.ragged import Batch
from recis_hybrid.saver.storage.resolve import storage_of

NAME = "config.yaml"
"""Name of the configuration file in a run's folder."""
_HEADER = "# Written by `recis-hybrid train`: the configuration that this run was last trained by.\n"
_FIXED = {
    "seed": "initial values and the order of rows depend on it",
    "data.shuffle": "the order of rows depends on it",
    "model.kind": "it changes the model",
    "model.hidden": "it changes the model",
    "model.batch_norm": "it changes the model",
    "optimizer.sparse": "tables hold the state of the previous optimizer",
}
_CHANGEABLE_OF_FEATURES = ("min_frequency", "std", "lr", "disk", "cache_bytes")
"""Keys of a feature that may change: those that affect only new ids or steps, or the place of the rows."""
_FIXED_OF_FEATURES = {"optimizer": _FIXED["optimizer.sparse"]}

_CHANGES_STAGES = "it changes the sequence of stages"

Changes = Mapping[str, tuple[Any, Any]]
"""Old and new value by key."""


def allowed_changes(recorded: Config, config: Config) -> dict[str, tuple[Any, Any]]:
    """Return the changes to a resumed run.

    The location of the training data may change freely; the dataset checks that the rows are the same.

    Args:
        recorded: Configuration of the run so far.
        config: Configuration to continue with.

    Raises:
        ConfigError: Some changes are not allowed; lists all of them with both values.
    """
    before, after = (
        dict(_flat(replace(each, data=replace(each.data, evaluate=_absolute(each.data.evaluate)))))
        for each in (recorded, config)
    )
    changed = {
        key: (before.get(key), after.get(key))
        for key in (before | after)
        if before.get(key) != after.get(key) and key not in ("run", "data.train")
    }
    changes_eviction = bool(recorded.evicted_tables()) != bool(config.evicted_tables())
    refused = []
    old: Any
    new: Any
    for key, (old, new) in changed.items():
        name = key.rpartition(".")[2]
        if key.startswith("features."):
            allowed = name in _CHANGEABLE_OF_FEATURES and key in before and key in after
            reason = None if allowed else _FIXED_OF_FEATURES.get(name, "it changes the model")
            if name == "evict_unused":
                reason = _CHANGES_STAGES if changes_eviction else None
            elif name == "lr" and allowed and (old is None) != (new is None):
                reason = "tables with a learning rate of their own have separate parameter groups"
        elif key == "data.evaluate":
            reason = _CHANGES_STAGES if (old is None) != (new is None) else None
        elif key == "train.evict_unused":
            reason = _CHANGES_STAGES if changes_eviction else None
        elif key == "model.dropout":
            reason = "a tower with dropout has other layers than one without" if (old > 0) != (new > 0) else None
        elif key == "train.precision":
            reason = "float16 keeps a loss scale in the checkpoint" if "float16" in (old, new) else None
        elif key == "train.metrics":
            has_patience = recorded.train.patience is not None and config.train.patience is not None
            reason = "train.patience monitors the first metric" if has_patience and old[:1] != new[:1] else None
        else:
            reason = _FIXED.get(key)
        if reason is not None:
            refused.append(f"{key} is {_text(old)} in the run, got {_text(new)} ({reason})")
    if refused:
        raise ConfigError(
            f"{config.run} cannot resume with changes to keys that are fixed: {'; '.join(refused)}. Keep the values of "
            f"{os.path.join(config.run, NAME)}, or start another run with run=FOLDER"
        )
    return changed


def recorded_config(run: str) -> Config:
    """Return the recorded configuration of a run.

    Args:
        run: The run's folder.

    Raises:
        ConfigError: The record is missing, or not a valid configuration of this version.
    """
    path = storage_of(run).root / NAME
    if not path.is_file():
        raise ConfigError(f"{run} has no {NAME}, which `recis-hybrid train` writes to the folder of a run")
    return replace(parse_config(path.read_bytes(), str(path), Path(run)), run=run)


def refuse_folder(run: str, config_path: Path) -> None:
    """Raise ConfigError if a run's folder is a file, or a handwritten configuration would be overwritten.

    Args:
        run: The run's folder.
        config_path: The configuration file.
    """
    path = Path(run)
    if is_url(run) or not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{config_path}: run must be a folder, but {run} is a file; choose another one")
    record = path / NAME
    if record.is_file() and record.samefile(config_path) and not record.read_bytes().startswith(_HEADER.encode()):
        raise ConfigError(
            f"{config_path}: run is the folder of this file, which the run would overwrite with its own {NAME}; choose "
            f"another folder, such as run: run"
        )


@dataclass
class RunRecord(Callback):
    """Callback that applies the current configuration to a run and records it.

    Learning rates are set from the configuration, even if the checkpoint has others. Changes to a resumed run are
    logged.

    Args:
        config: The configuration.
        changes: Changes to a resumed run.
        log: Callback that receives the changes.
    """

    config: Config
    changes: Changes
    log: Callback

    def __post_init__(self) -> None:
        self._written = False

    def before_fit(self, trainer: Run) -> None:
        """Replace the checkpoint's learning rates with the configuration's."""
        features, rates = self.config.features, self.config.optimizer
        of_tables = {each.table or name: each.lr for name, each in features.items() if each.lr is not None}
        for name, part in trainer.parts().items():
            if not isinstance(part, torch.optim.Optimizer):
                continue
            for group in part.param_groups:
                if name == "sparse":  # a group has one table, or several without learning rates of their own
                    table = group["params"][0].table.members[0].name
                    group["lr"] = of_tables.get(table, rates.sparse_lr)
                elif name == "dense":
                    group["lr"] = rates.dense_lr

    def before_step(self, trainer: Run, batches: Sequence[Batch]) -> None:
        """Record the configuration before the first step that uses it."""
        if self._written or distributed.rank() != 0:
            return
        self._written = True
        data = self.config.data
        shown = replace(
            self.config, run=".", data=replace(data, train=_absolute(data.train), evaluate=_absolute(data.evaluate))
        )
        path = storage_of(self.config.run).root / NAME
        text = (_HEADER + write_yaml(asdict(shown))).encode()
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{NAME}.partial")
            partial.write_bytes(text)
            os.replace(partial, path)
        else:
            path.write_bytes(text)
        if self.changes:
            changes = {key: [old, new] for key, (old, new) in self.changes.items()}
            self.log.on_log(trainer, {"event": "config", "step": trainer.steps_done, "changes": changes})


def changes_text(changes: Changes) -> str:
    """Return changes as readable text."""
    return ", ".join(f"{key} from {_text(old)} to {_text(new)}" for key, (old, new) in changes.items())


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield keys and values of a configuration, descending into sections and features."""
    items = vars(value).items() if is_dataclass(value) else value.items()
    for key, each in items:
        if is_dataclass(each) or (isinstance(each, dict) and any(map(is_dataclass, each.values()))):
            yield from _flat(each, f"{prefix}{key}.")
        elif not isinstance(each, dict):
            yield f"{prefix}{key}", each


def _absolute(paths: Any) -> Any:
    if isinstance(paths, list):
        return [_absolute(path) for path in paths]
    return paths if paths is None or is_url(paths) else os.path.abspath(paths)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
