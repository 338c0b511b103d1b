"""The configuration of a resumed run: allowed changes, and the record in the run's folder."""

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
"""The file in a run's folder that holds the configuration."""
_HEADER = "# Written by `recis-hybrid train`: the configuration that this run was last trained by.\n"
_FIXED = {
    "seed": "tables and the order of rows are drawn from it",
    "data.shuffle": "the order of rows depends on it",
    "model.kind": "it is another model",
    "model.hidden": "it is another model",
    "model.batch_norm": "it is another model",
    "optimizer.sparse": "tables hold the state of the other optimizer",
}
_OF_FEATURES = ("min_frequency", "std")
"""Keys of a feature that may change; they affect later ids only."""

Changes = Mapping[str, tuple[Any, Any]]
"""By key, the old value and the new one."""


def allowed_changes(recorded: Config, config: Config) -> dict[str, tuple[Any, Any]]:
    """Return what changes in a run that is resumed.

    Where the data lie is no change; that they are the same rows is what the dataset checks.

    Args:
        recorded: What the run was trained by.
        config: What it is to go on with.

    Raises:
        ConfigError: A key changes that cannot: all of these are named with both values.
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
    refused = []
    old: Any
    new: Any
    for key, (old, new) in changed.items():
        name = key.rpartition(".")[2]
        if key.startswith("features."):
            why = None if name in _OF_FEATURES and key in before and key in after else "it is another model"
        elif key in ("data.evaluate", "train.evict_unused"):
            why = "the stages of the run are counted" if (old is None) != (new is None) else None
        elif key == "model.dropout":
            why = "a tower with dropout has other layers than one without" if (old > 0) != (new > 0) else None
        elif key == "train.precision":
            why = "float16 scales losses, and keeps the scale" if "float16" in (old, new) else None
        elif key == "train.metrics":
            follows = recorded.train.patience is not None and config.train.patience is not None
            why = "train.patience follows the first metric" if follows and old[:1] != new[:1] else None
        else:
            why = _FIXED.get(key)
        if why is not None:
            refused.append(f"{key} is {_text(old)} in the run, got {_text(new)} ({why})")
    if refused:
        raise ConfigError(
            f"{config.run} cannot go on with another value of what it was begun with: {'; '.join(refused)}. Leave "
            f"these keys as they are in {os.path.join(config.run, NAME)}, or begin another run by run=FOLDER"
        )
    return changed


def recorded_config(run: str) -> Config:
    """Return the configuration that a run has recorded.

    Args:
        run: The run's folder.

    Raises:
        ConfigError: There is none, or it is no configuration of this version.
    """
    path = storage_of(run).root / NAME
    if not path.is_file():
        raise ConfigError(f"{run} has no {NAME}, which `recis-hybrid train` writes into the folder of a run")
    return replace(parse_config(path.read_bytes(), str(path), Path(run)), run=run)


def refuse_folder(run: str, given: Path) -> None:
    """Raise ConfigError if a run's folder is a file, or a handwritten configuration would be overwritten.

    Args:
        run: The folder.
        given: The configuration.
    """
    path = Path(run)
    if is_url(run) or not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{given}: run must be a folder, {run} is a file; name another one")
    there = path / NAME
    if there.is_file() and there.samefile(given) and not there.read_bytes().startswith(_HEADER.encode()):
        raise ConfigError(
            f"{given}: run is the folder of this very file, over which the run would write its own {NAME}; name "
            f"another folder, as run: run"
        )


@dataclass
class RunRecord(Callback):
    """Applies the current configuration to a resumed run, and records it.

    Learning rates are those of the configuration, whatever the checkpoint says. Changes of a resumed run go into the
    log, too.

    Args:
        config: The configuration.
        changes: What changes in a run that is resumed.
        log: Takes the changes.
    """

    config: Config
    changes: Changes
    log: Callback

    def __post_init__(self) -> None:
        self._written = False

    def before_fit(self, trainer: Run) -> None:
        """Set the configuration's learning rates, in place of the checkpoint's."""
        rates = {"dense": self.config.optimizer.dense_lr, "sparse": self.config.optimizer.sparse_lr}
        for name, part in trainer.parts().items():
            if isinstance(part, torch.optim.Optimizer) and name in rates:
                for group in part.param_groups:
                    group["lr"] = rates[name]

    def before_step(self, trainer: Run, batches: Sequence[Batch]) -> None:
        """Record the configuration before the first step; without a step, nothing was trained by it."""
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
    """Yield keys and values of a configuration, down to lists and mappings of no fixed keys."""
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
