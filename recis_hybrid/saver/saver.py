"""`Saver`: checkpoints that appear whole or not at all, and are verified before anything is changed."""

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from recis_hybrid.saver.adapters import part_of
from recis_hybrid.saver.background import Background
from recis_hybrid.saver.chain import Checkpoint, last_complete, needed_steps
from recis_hybrid.saver.directory import STEP, step_name
from recis_hybrid.saver.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint
from recis_hybrid.saver.files import sync_directory
from recis_hybrid.saver.lease import Lease
from recis_hybrid.saver.manifest import MANIFEST, Link, PartEntry
from recis_hybrid.saver.partial import load_some
from recis_hybrid.saver.protocol import JSON, PartState
from recis_hybrid.saver.selection import Loaded, Selection
from recis_hybrid.saver.snapshot import snapshot
from recis_hybrid.saver.tracking import Tracking
from recis_hybrid.saver.writing import write_checkpoint

_LEFTOVER = re.compile(r"\.step_\d{6,18}\.(?:partial|deleted)")
_LARGEST_STEP = 10**18 - 1


class Saver:
    """Saves and loads the state of a training run in one directory.

    A part is an object that implements `Saveable`, a `torch.nn.Module`, a `torch.optim.Optimizer`, a `torch.Generator`,
    an object with `state_dict` and `load_state_dict` (a scheduler, a scaler, a `ColumnDataset`), or a JSON value.
    Files are safetensors and JSON, as docs/format.md specifies; nothing that is read is ever executed.

    One job saves in a directory at a time; a second is refused until the first has ended or its saver is gone.

    Args:
        path: directory of the checkpoints, on a local file system; made at the first save.
        keep: how many checkpoints to keep, or None for all; the oldest are deleted after a new one is in place, but for
            those that a kept one builds on.
        async_save: whether `save` returns once it has copied the state, which a thread then writes. The next call of
            this saver waits for it and raises what went wrong; so does the end of the process, on stderr.

    Raises:
        CheckpointError: the path is a URL, or `keep` is no positive integer.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> saver = Saver(tempfile.mkdtemp(), keep=2)
        >>> saver.save(100, model=model, optimizer=optimizer, note={"epoch": 1}).name
        'step_000100'
        >>> saver.load(model=model, optimizer=optimizer)
        100
        >>> saver.read_json("note")
        {'epoch': 1}
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int | None = 5, async_save: bool = False) -> None:
        if "://" in os.fspath(path):
            raise CheckpointError(
                f"Saver: path must be a local directory, got {os.fspath(path)!r}. Save to a local one."
            )
        if keep is not None and (type(keep) is not int or keep < 1):
            raise CheckpointError(f"Saver: keep must be an integer of at least 1, or None, got {keep!r}.")
        self._root = Path(path).absolute()
        self._keep = keep
        self._async_save = async_save
        self._lease = Lease(self._root)
        self._background = Background()
        self._tracking = Tracking(self._root)

    def steps(self) -> list[int]:
        """Find the complete checkpoints.

        Returns:
            Their steps, ascending.
        """
        if not self._root.is_dir():
            return []
        names = [entry.name for entry in os.scandir(self._root) if entry.is_dir()]
        found = [int(match[1]) for match in map(STEP.fullmatch, names) if match]
        return sorted(step for step in found if (self._directory(step) / MANIFEST).is_file())

    def latest(self) -> int | None:
        """Find the newest complete checkpoint.

        Returns:
            Its step, the highest one; None if there is none.
        """
        return max(self.steps(), default=None)

    def save(self, step: int, *, delta: bool = False, **parts: object) -> Path:
        """Save the parts as one checkpoint.

        It is written under a temporary name, forced to the disk, and renamed: a crash at any moment leaves the
        checkpoints before it whole, and its remains are removed by the next save.

        With `delta`, tables write only rows that were looked up in training, updated, inserted or removed since this
        saver's last save, and the checkpoint builds on that one; all else is written whole. The first save with `delta`
        is whole, as is one whose earlier checkpoint is gone: from then on the tables note the ids that are erased,
        evicted and inserted by hand, 8 bytes each until the next save, and a copy of admission's counts.

        Args:
            step: number of the step, from 0 to 10**18 - 1, above all steps saved in the directory, so that the latest
                is the one that was written last.
            delta: whether to write just what changed, where that is possible.
            **parts: what to save, by name.

        Returns:
            Directory of the checkpoint; with `async_save` it may not be there yet.

        Raises:
            CheckpointError: a part cannot be saved, the step is not above the latest, more than one process trains,
                another job saves in the directory, the files cannot be written, or the save before this one failed in
                the background.
        """
        _refuse_many_processes()
        self.wait()
        latest = self.latest()
        if type(step) is not int or not 0 <= step <= _LARGEST_STEP:
            raise CheckpointError(f"Saver.save: step must be an integer from 0 to {_LARGEST_STEP}, got {step!r}.")
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"Saver.save: step must be above the latest one in {self._root}, {latest}, got {step}. Save to another "
                "directory, or delete the later checkpoints first."
            )
        if type(delta) is not bool:
            raise CheckpointError(
                f"Saver.save: delta must be True or False, got a {type(delta).__name__}. A part cannot have this name: "
                "give it another."
            )
        if not parts:
            raise CheckpointError("Saver.save: there must be a part to save, got none. Pass parts by name.")
        adapters = {name: part_of(name, value) for name, value in parts.items()}
        self._root.mkdir(parents=True, exist_ok=True)
        sync_directory(self._root.parent)
        self._lease.take()
        self._remove_leftovers()
        self._tracking.on |= delta
        link = self._tracking.link() if delta else None
        watches: dict[str, object] = {}
        taking = self._tracking.state
        states = ((name, part.kind, taking(name, part, link, watches)) for name, part in adapters.items())
        if self._async_save:
            taken = [(name, kind, snapshot(state)) for name, kind, state in states]
            write = partial(self._write, step, (taken.pop(0) for _ in range(len(taken))), link, watches)
            self._background.start(f"the save of step {step} in {self._root}", write)
        else:
            self._write(step, states, link, watches)
        return self._directory(step)

    def wait(self) -> None:
        """Wait for a save in the background.

        Raises:
            CheckpointError: it failed; the checkpoints before it are whole.
        """
        self._background.wait()

    def _write(
        self, step: int, parts: Iterable[tuple[str, str, PartState]], link: Link | None, watches: dict[str, object]
    ) -> None:
        write_checkpoint(self._root, step, parts, lambda folder: folder.rename(self._directory(step)), link)
        self._tracking.settle(step, watches)
        self._delete_oldest()

    def load(self, step: int | Literal["latest"] = "latest", **parts: object) -> int:
        """Load parts of a checkpoint into live objects.

        The files of the parts are verified first (list, sizes, checksums, structure), then compared with the objects;
        only if all is sound is anything changed. Parts that the checkpoint has and the call does not name are left
        alone.

        Args:
            step: which checkpoint; the highest complete step by default.
            **parts: the objects to load into, by the names under which they were saved. JSON is read by `read_json`.

        Returns:
            The step that was loaded.

        Raises:
            CorruptCheckpoint: a file is missing, unknown or changed.
            CheckpointMismatch: the checkpoint is one of another model, or lacks a part.
            CheckpointError: there is no such checkpoint, it has another format version, or a part cannot be loaded.
        """
        self.wait()
        if not parts:
            raise CheckpointError("Saver.load: there must be a part to load, got none. Pass parts by name.")
        adapters = {name: part_of(name, value) for name, value in parts.items()}
        found = self._resolve(step)
        try:
            checkpoint = Checkpoint(self._root, found)
            for name, part in adapters.items():
                _entry(checkpoint, name, part.kind)
            for name in adapters:
                checkpoint.verify(name)
            states = {name: checkpoint.read(name) for name in adapters}
            for name, part in adapters.items():
                part.check(f"{checkpoint.directory / MANIFEST}: part {name!r}", states[name])
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{error} {self._others(found, str(error))}") from error
        for name, part in adapters.items():
            part.load(states.pop(name))
        # Whoever loads what is incremental will go on so.
        self._tracking.on |= checkpoint.manifest.previous is not None
        self._tracking.loaded(found, adapters)
        return found

    def load_some(
        self, step: int | Literal["latest"] = "latest", *, only: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (), rename: Mapping[str, str] | None = None, strict: bool = True,
        **parts: object,
    ) -> Loaded:  # fmt: skip
        """Load some tables of an engine and some tensors of modules, from a checkpoint of this or of another model.

        Names are those of tables, and of parameters and buffers. Patterns have `*`, `?` and `[...]`. All that is
        selected is verified and compared before anything is changed; what is not selected stays as it was. Rows keep
        their optimizer state; their steps become the table's own, as if they had just been met.

        Args:
            step: which checkpoint; the highest complete step by default.
            only: patterns of the names to load; None for all.
            exclude: patterns of names to leave out.
            rename: names in the checkpoint and in the live object, with `*`: `{"encoder.*": "tower.*"}`.
            strict: whether every selected name must be in both, in the same form. Else what fits is loaded: embeddings
                of the same width whatever their dtype, with the optimizer state that both have.
            **parts: the engines and modules to load into, by the names under which they were saved.

        Returns:
            What was loaded and what not.

        Raises:
            CorruptCheckpoint: a file is missing, unknown or changed.
            CheckpointMismatch: strict, and something selected does not fit; or the checkpoint lacks a part.
            CheckpointError: there is no such checkpoint, or a part is neither an engine nor a module.
        """
        self.wait()
        if not parts:
            raise CheckpointError("Saver.load_some: there must be a part to load, got none. Pass parts by name.")
        selection = Selection(only, exclude, rename)
        adapters = {name: part_of(name, value) for name, value in parts.items()}
        found = self._resolve(step)
        try:
            checkpoint = Checkpoint(self._root, found)
            for name, part in adapters.items():
                _entry(checkpoint, name, part.kind)
            return load_some(checkpoint, adapters, selection, strict)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{error} {self._others(found, str(error))}") from error

    def read_json(self, name: str, step: int | Literal["latest"] = "latest") -> JSON:
        """Read a JSON value that was saved as a part.

        Args:
            name: name of the part.
            step: which checkpoint; the highest complete step by default.

        Returns:
            The value.

        Raises:
            CorruptCheckpoint: a file is missing, unknown or changed.
            CheckpointMismatch: the checkpoint has no such part, or it is no JSON value.
            CheckpointError: there is no such checkpoint, or it has another format version.
        """
        self.wait()
        found = self._resolve(step)
        try:
            checkpoint = Checkpoint(self._root, found)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{error} {self._others(found, str(error))}") from error
        return _entry(checkpoint, name, "json").meta.get("value")

    def _directory(self, step: int) -> Path:
        return self._root / step_name(step)

    def _resolve(self, step: int | Literal["latest"]) -> int:
        steps = self.steps()
        wanted = max(steps, default=None) if step == "latest" else step
        if wanted is None or wanted not in steps:
            raise CheckpointError(
                f"Saver.load: {self._root} must hold a complete checkpoint of step {step!r}, it holds {steps}. Save "
                "first, or name one of these."
            )
        return wanted

    def _others(self, step: int, error: str) -> str:
        others = [other for other in self.steps() if other != step]
        if not others:
            return f"There is no other step in {self._root}."
        # A file that the message names may be of an earlier one, on which others build too.
        last = last_complete(self._root, [other for other in others if f"{self._directory(other)}/" not in error])
        offer = "none of them has all its files" if last is None else f"the last one with all its files is {last}"
        return f"Other steps in {self._root}: {others}. Of these, {offer}."

    def _remove_leftovers(self) -> None:
        for entry in list(os.scandir(self._root)):
            if _LEFTOVER.fullmatch(entry.name):
                shutil.rmtree(entry.path)

    def _delete_oldest(self) -> None:
        if self._keep is None:
            return
        steps = self.steps()
        try:
            needed = needed_steps(self._root, steps[-self._keep :])
        except CheckpointError:
            # What a damaged one builds on is not known: nothing goes until it has left the newest.
            return
        # What builds on another goes before it: at no moment is there one that lacks what it needs.
        for step in reversed(steps[: -self._keep]):
            if step in needed:
                continue
            # Renamed first: a crash within the deletion leaves no checkpoint that looks whole and is not.
            doomed = self._root / f".{step_name(step)}.deleted"
            self._directory(step).rename(doomed)
            shutil.rmtree(doomed)


def _entry(checkpoint: Checkpoint, name: str, kind: str) -> PartEntry:
    parts = checkpoint.manifest.parts
    entry = parts.get(name)
    where = f"{checkpoint.directory / MANIFEST}: part {name!r}"
    if entry is None:
        raise CheckpointMismatch(
            f"{where} must be in the checkpoint, which has {sorted(parts)}. Leave it out, or save it first."
        )
    if entry.kind != kind:
        remedy = "Use Saver.read_json." if entry.kind == "json" else "Pass the object that was saved under this name."
        raise CheckpointMismatch(f"{where} was saved from a {entry.kind}, but a {kind} was asked for. {remedy}")
    return entry


def _refuse_many_processes() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = torch.distributed.get_world_size()
        if size > 1:
            raise CheckpointError(
                f"Saver.save: one process must train, torch.distributed has {size}. Save from a run of one process."
            )
