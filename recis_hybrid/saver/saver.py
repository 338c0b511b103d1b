"""``Saver``: atomic checkpoints, verified before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Literal

import torch
import torch.distributed as dist

from recis_hybrid.checkpointing import JSON, HostMemory
from recis_hybrid.saver.actions.load import PartToLoad, load_parts
from recis_hybrid.saver.actions.load_partial import load_some
from recis_hybrid.saver.actions.selection import Loaded, Selection
from recis_hybrid.saver.actions.write import CapturedPart, write_checkpoint
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint, link_to, obsolete_steps, other_steps
from recis_hybrid.saver.checkpoint.change_tracking import Tracking
from recis_hybrid.saver.errors import CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.manifest import MANIFEST, Link
from recis_hybrid.saver.format.row_file import Reads
from recis_hybrid.saver.parts.adapters import parts_of
from recis_hybrid.saver.parts.part import Part, captured
from recis_hybrid.saver.parts.per_rank import PerRank, name_of_rank
from recis_hybrid.saver.runtime.background import Background
from recis_hybrid.saver.runtime.ranks import Ranks
from recis_hybrid.saver.storage.resolve import storage_of
from recis_hybrid.saver.storage.shared_check import refuse_unshared
from recis_hybrid.saver.storage.step_directory import step_name
from recis_hybrid.validation import check_flag, check_integer, describe_value

_LARGEST_STEP = 10**18 - 1


class Saver:
    """Saves and loads the state of a training run in one directory.

    A part is an object that implements ``Saveable``, a ``torch.nn.Module``, a ``torch.optim.Optimizer``, a
    ``torch.Generator``, an object with ``state_dict`` and ``load_state_dict`` (a scheduler, a scaler, a
    ``ColumnDataset``), or a JSON value. Optimizers match their parameters by name, if the modules are saved with them,
    and otherwise by order. Files are safetensors and JSON, as specified in docs/format.md. Nothing that is
    read is ever executed.

    Only one job at a time can save to a directory. A second one is refused until the first has ended or its saver is
    deleted.

    In a distributed job, all ranks call ``save`` and ``load`` with the same step and part names, and read and write in
    parallel. Each rank handles its own buckets of tables (``recis_hybrid.checkpointing.owned_buckets``), or the rows
    that the sharding of an ``EmbeddingEngine`` assigns to it. World size and sharding may differ between save and load.
    All other parts must be the same on all ranks: only those of rank 0 are saved, unless they are wrapped in
    ``PerRank``. The reading position of a ``ColumnDataset`` is the same on all ranks and needs no ``PerRank``. If one
    rank fails, all raise.

    Args:
        path: Directory of the checkpoints, shared by all ranks and created by the first save; or a URL of an object
            store or another file system that pyarrow or fsspec supports, such as ``s3://bucket/run``. There, a
            checkpoint is complete once its manifest is written, and a new job takes over from the one that saved there
            before.
        keep: Number of checkpoints to keep, or None for all. The oldest are deleted once a new one is complete, except
            those that a kept checkpoint builds on.
        async_save: Whether ``save`` returns as soon as the state is copied, and a thread writes the copy. The next call
            of this saver waits for the thread and raises its exception, if any; an exception that no call has raised is
            printed to stderr when the process ends. The next save reuses the memory of the copy.
        save_frozen: Whether to save parameters that are frozen and unchanged since they were read from the files of a
            pretrained model (``recis_hybrid.towers.hf_tower``). By default the checkpoint names the files and their
            digest instead, and loading needs them.
        group: A gloo process group of the ranks that save together, used by nothing else. None creates a group of all
            ranks if torch.distributed has several.

    Raises:
        CheckpointError: No file system is known for the URL.
        TypeError: ``keep`` is not an integer.
        ValueError: ``keep`` is below 1.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> saver = Saver(tempfile.mkdtemp(), keep=2)
        >>> saver.save(100, {"model": model, "optimizer": optimizer, "note": {"epoch": 1}}).name
        'step_000100'
        >>> saver.load({"model": model, "optimizer": optimizer})
        100
        >>> saver.read_json("note")
        {'epoch': 1}
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keep: int | None = 5,
        async_save: bool = False,
        save_frozen: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._storage = storage_of(path)
        self._root = self._storage.root
        self._keep = None if keep is None else check_integer("Saver", "keep", keep, 1)
        self._memory = HostMemory() if async_save else None
        check_flag("Saver", "save_frozen", save_frozen)
        self._save_frozen = save_frozen
        self._group = group
        self._ranks: Ranks | None = None
        self._is_shared = False
        self._background = Background()
        self._deletion = Background()
        self._tracking = Tracking(self._root)
        self._links: dict[int, int | None] = {}
        self.bytes_read = 0
        """Bytes that this process read from files in the last load."""

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return self._storage.steps()

    def latest(self) -> int | None:
        """Return the highest step of a complete checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def digest(self, step: int, *, wait: bool = False) -> str | None:
        """Return the digest of a checkpoint, by which logs, bundles and later checkpoints refer to it.

        Args:
            step: Step of the checkpoint.
            wait: Whether to wait for a save in the background first.

        Returns:
            The SHA-256 of its manifest, which has the checksums of all files, in 64 hexadecimal digits; None if there
            is no complete checkpoint of this step.
        """
        if wait:
            self._background.join()
        if not (self._root / step_name(step) / MANIFEST).is_file():
            return None
        return link_to(self._root, step).sha256

    @torch.inference_mode(False)
    def save(self, step: int, parts: Mapping[str, object], *, delta: bool = False) -> Location:
        """Save the parts as one checkpoint; collective.

        The checkpoint is written under a temporary name, synced to disk, and renamed. A crash at any moment leaves
        earlier checkpoints intact, and the next save removes what it left behind.

        With ``delta``, the checkpoint is incremental: tables write only rows that were looked up in training, updated,
        inserted or removed since the last save of this saver, and the checkpoint builds on that one. Everything else is
        written in full. The first save with ``delta`` is full, and so is one whose base checkpoint is missing. From the
        first one on, the tables record the ids that are erased, evicted and inserted manually, 8 bytes each until the
        next save, and keep a copy of the admission counts.

        Args:
            step: Training step, from 0 to 10**18 - 1. It must be above all steps saved in the directory, so that the
                latest checkpoint is also the newest.
            parts: Objects to save, by name.
            delta: Whether to save only changes where possible.

        Returns:
            Directory of the checkpoint. With ``async_save`` it may not exist yet.

        Raises:
            CheckpointError: A part cannot be saved, the step is not above the latest, another job saves in the
                directory, not all ranks see it, the files cannot be written, another rank failed, or the previous save
                failed in the background.
            TypeError: ``delta`` is not a bool.
        """
        ranks = self._get_ranks()
        ranks.together(self.wait)
        adapters: dict[str, Part] = {}

        def prepare() -> JSON:
            checked = self._checked_step(step)
            check_flag("Saver.save", "delta", delta)
            _check_parts("Saver.save", parts)
            adapters.update(parts_of(parts, save_frozen=self._save_frozen))
            if ranks.rank == 0:
                self._storage.take()
            return [checked, delta, [[name, part.kind, _is_per_rank(parts[name])] for name, part in adapters.items()]]

        answers = ranks.together(prepare)
        if any(answer != answers[0] for answer in answers):
            raise CheckpointError(
                f"Saver.save: all ranks must save the same step and parts, got {answers}. Pass the same on every rank."
            )
        if not self._is_shared:
            refuse_unshared(self._root, ranks)
            self._is_shared = True
        self._tracking.enabled |= delta
        link, changes = self._tracking.changes(ranks, adapters) if delta else (None, {})
        states: dict[str, CapturedPart] = {}
        watches: dict[str, object] = {}

        def capture() -> None:
            if self._memory is not None:
                self._memory.reuse()
            for name, part in adapters.items():
                if name in changes:
                    state = captured(changes[name], self._memory)
                elif part.tables is not None:
                    state = part.tables.checkpoint_snapshot(self._memory)
                else:
                    state = part.capture(self._memory)
                states[name] = CapturedPart(part.kind, state, _is_per_rank(parts[name]))
            watches.update(self._tracking.watch(adapters))

        ranks.together(capture)
        write = partial(self._write, int(step), states, link, watches)
        if self._memory is None:
            write()
        else:
            self._background.start(f"the save of step {step} in {self._root}", write)
        return self._root / step_name(int(step))

    @torch.inference_mode(False)
    def wait(self) -> None:
        """Wait until the background save and the deletion of old checkpoints are done.

        Raises:
            CheckpointError: One of them failed. Other checkpoints are intact.
        """
        self._background.wait()
        self._deletion.wait()

    def _write(
        self, step: int, parts: Mapping[str, CapturedPart], link: Link | None, watches: dict[str, object]
    ) -> None:
        ranks = self._get_ranks()
        write_checkpoint(self._storage, ranks, step, parts, link)
        self._tracking.start_from(ranks, step, watches)
        self._links[step] = None if link is None else link.step

        def delete_oldest() -> None:
            if ranks.rank == 0 and self._keep is not None:
                for old in obsolete_steps(self._root, self.steps(), self._keep, self._links):
                    self._deletion.start(f"the deletion of step {old} in {self._root}", self._storage.remove(old))

        ranks.together(delete_oldest)

    @torch.inference_mode(False)
    def load(self, parts: Mapping[str, object], step: int | Literal["latest"] = "latest") -> int:
        """Load parts of a checkpoint into live objects; collective.

        The files of the parts are verified (names, sizes, checksums, structure) and compared with the objects before
        anything is changed. Rows of an ``EmbeddingEngine`` are verified as they are read: tables that hold rows are
        replaced only after their files have been read once for verification. Empty tables are filled immediately, and
        cleared again if a file is damaged. Parts of the checkpoint that are not in ``parts`` are ignored. Each rank
        reads only the rows of its own buckets.

        Placement, dtype, coalescing and optimizer of tables may differ from those saved. Values are converted,
        optimizer state is loaded where name and width agree, and missing state starts with its first value, with a
        warning.

        Args:
            parts: Objects to load into, by the names under which they were saved. Use ``read_json`` for JSON values.
            step: Step to load; the latest complete checkpoint by default.

        Returns:
            The loaded step.

        Raises:
            CorruptCheckpoint: A file is missing, unknown or changed.
            CheckpointMismatch: The checkpoint belongs to another model, or lacks a part.
            CheckpointError: The checkpoint does not exist, its format version is not supported, or a part cannot be
                loaded.
        """
        ranks = self._get_ranks()
        ranks.together(self.wait)
        _check_parts("Saver.load", parts)
        resolved: int = ranks.together(lambda: self._resolve(step) if ranks.rank == 0 else None)[0]
        reads, opened = Reads(), list[StoredCheckpoint]()
        chosen: dict[str, PartToLoad] = {}

        def choose() -> None:
            opened.append(StoredCheckpoint(self._root, resolved, listed=ranks.rank == 0))
            adapters = parts_of(parts)
            for name, value in parts.items():
                saved = name_of_rank(name, value, opened[0].manifest, ranks.rank)
                if saved is not None:
                    chosen[name] = PartToLoad(adapters[name], saved, opened[0].part(saved, adapters[name].kind))

        try:
            ranks.together(choose)
            changed = load_parts(opened[0], ranks, chosen, reads)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{error} {other_steps(self._root, self.steps(), resolved, str(error))}") from error
        finally:
            self.bytes_read = reads.bytes
        # Keep tracking after loading an incremental checkpoint.
        self._tracking.enabled |= opened[0].manifest.previous is not None
        same = {name: each.part for name, each in chosen.items() if name not in changed}
        self._tracking.start_from(ranks, resolved, self._tracking.watch(same))
        return resolved

    @torch.inference_mode(False)
    def load_some(
        self,
        parts: Mapping[str, object],
        step: int | Literal["latest"] = "latest",
        *,
        only: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        rename: Mapping[str, str] | None = None,
        strict: bool = True,
    ) -> Loaded:
        """Load some tables of engines and some tensors of modules, possibly from a checkpoint of another model.

        Names are those of tables, parameters and buffers. Patterns may contain ``*``, ``?`` and ``[...]``. Everything
        selected is verified and compared before anything is changed; everything else stays unchanged. Rows keep their
        optimizer state. A table that has done no step continues from the steps of its rows. Otherwise the rows get the
        table's step, as if they had just been looked up.

        A torch optimizer that is passed together with its modules loads the state of the selected parameters, by the
        same names. Its hyperparameters stay, and the state of other parameters too: that of a new layer is empty.

        Args:
            parts: Engines, modules and torch optimizers to load into, by the names under which they were saved.
            step: Step to load; the latest complete checkpoint by default.
            only: Patterns of the names to load; None for all.
            exclude: Patterns of names to skip.
            rename: Maps names in the checkpoint to names in the live object, with ``*``: ``{"encoder.*": "tower.*"}``.
            strict: Whether every selected name must exist on both sides with the same dtypes and shapes. Otherwise
                whatever fits is loaded: embeddings of the same width in any dtype, with the optimizer state that both
                sides have.

        Returns:
            Names that were loaded, and those that were not.

        Raises:
            CorruptCheckpoint: A file is missing, unknown or changed.
            CheckpointMismatch: Strict, and something selected does not fit; or the checkpoint lacks a part.
            CheckpointError: The checkpoint does not exist, a part is neither an engine, a module nor a torch optimizer
                whose parameters have names, or a pattern of ``only``, ``exclude`` or ``rename`` matches no name of any
                part, whether strict or not.
        """
        ranks = self._get_ranks()
        ranks.together(self.wait)
        _check_parts("Saver.load_some", parts)
        selection = Selection(only, exclude, rename)
        resolved: int = ranks.together(lambda: self._resolve(step) if ranks.rank == 0 else None)[0]
        adapters = parts_of(parts)
        opened: list[StoredCheckpoint] = []

        def find() -> None:
            opened.append(StoredCheckpoint(self._root, resolved, listed=ranks.rank == 0))
            for name, part in adapters.items():
                opened[0].part(name, part.kind)

        try:
            ranks.together(find)
            return load_some(opened[0], ranks, adapters, selection, strict)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{error} {other_steps(self._root, self.steps(), resolved, str(error))}") from error

    def read_json(self, name: str, step: int | Literal["latest"] = "latest") -> JSON:
        """Read a JSON value that was saved as a part.

        Args:
            name: Name of the part.
            step: Step to read; the latest complete checkpoint by default.

        Returns:
            The value.

        Raises:
            CorruptCheckpoint: A file is missing, unknown or changed.
            CheckpointMismatch: The checkpoint has no such part, or it is not a JSON value.
            CheckpointError: The checkpoint does not exist, or its format version is not supported.
        """
        self.wait()
        resolved = self._resolve(step)
        try:
            checkpoint = StoredCheckpoint(self._root, resolved)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{error} {other_steps(self._root, self.steps(), resolved, str(error))}") from error
        return checkpoint.part(name, "json").meta.get("value")

    def _get_ranks(self) -> Ranks:
        """Return the ranks; collective, because the first call may create a group."""
        if self._ranks is None:
            self._ranks = Ranks.of(self._group)
        return self._ranks

    def _checked_step(self, step: int) -> int:
        if not isinstance(step, Integral) or isinstance(step, bool) or not 0 <= step <= _LARGEST_STEP:
            raise CheckpointError(f"Saver.save: step must be an integer from 0 to {_LARGEST_STEP}, got {step!r}.")
        latest = self.latest() if self._get_ranks().rank == 0 else None
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"Saver.save: step must be above the latest one in {self._root}, {latest}, got {step}. Save to another "
                "directory, or delete the later checkpoints first."
            )
        return int(step)

    def _resolve(self, step: int | Literal["latest"]) -> int:
        steps = self.steps()
        if step != "latest" and (not isinstance(step, Integral) or isinstance(step, bool)):
            raise CheckpointError(f"Saver.load: step must be an integer or 'latest', got {describe_value(step)}.")
        wanted = max(steps, default=None) if step == "latest" else int(step)
        if wanted is None or wanted not in steps:
            raise CheckpointError(
                f"Saver.load: {self._root} must hold a complete checkpoint of step {step!r}, it holds {steps}. Save "
                "first, or choose one of these."
            )
        return wanted


def _check_parts(where: str, parts: object) -> None:
    """Raise CheckpointError unless ``parts`` is a non-empty mapping from names to objects."""
    if not isinstance(parts, Mapping) or not parts or not all(isinstance(name, str) for name in parts):
        got = list(parts) if isinstance(parts, Mapping) else type(parts).__name__
        raise CheckpointError(
            f"{where}: parts must be a mapping from at least one name to an object, such as {{'model': model}}, got "
            f"{got}."
        )


def _is_per_rank(part: object) -> bool:
    return isinstance(part, PerRank)
