"""``Saver``: checkpoints that appear whole or not at all, and are verified before anything is changed."""

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
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint, other_steps, superfluous
from recis_hybrid.saver.checkpoint.change_tracking import Tracking
from recis_hybrid.saver.errors import CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.manifest import Link
from recis_hybrid.saver.format.row_file import Reads
from recis_hybrid.saver.parts.adapters import part_of
from recis_hybrid.saver.parts.part import Part
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
    ``ColumnDataset``), or a JSON value. Files are safetensors and JSON, as docs/format.md specifies; nothing that is
    read is ever executed.

    One job saves in a directory at a time; a second is refused until the first has ended or its saver is gone.

    In a job of several processes all of them call ``save`` and ``load`` alike, and read and write in parallel: each its
    own buckets of tables (``recis_hybrid.checkpointing.owned_buckets``), or what the sharding of an ``EmbeddingEngine``
    gives it, whatever the world size and the sharding were when they were saved. All other parts are the same on all
    ranks, and rank 0's are saved, but for those in a ``PerRank``. If one rank fails, all raise.
    The reading position of a ``ColumnDataset`` is the same on all ranks, and needs no ``PerRank``.

    Args:
        path: Directory of the checkpoints, which all ranks see, made at the first save; or a URL of an object store or
            another file system that pyarrow or fsspec know, such as ``s3://bucket/run``. There a checkpoint is complete
            once its manifest is written, and who saves last takes over from a job that saved there before.
        keep: How many checkpoints to keep, or None for all; the oldest are deleted after a new one is in place, but for
            those that a kept one builds on.
        async_save: Whether ``save`` returns once it has copied the state, which a thread then writes. The next call of
            this saver waits for it and raises what went wrong; so does the end of the process, on stderr. The memory
            of the copy is kept for the next one.
        group: A gloo process group of the processes that save together, used by nothing else; None makes one of all
            processes where torch.distributed has several.

    Raises:
        CheckpointError: Nothing is known to read such a URL, or ``keep`` is no positive integer.

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
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._storage = storage_of(path)
        self._root = self._storage.root
        self._keep = None if keep is None else check_integer("Saver", "keep", keep, 1)
        self._memory = HostMemory() if async_save else None
        self._group = group
        self._ranks: Ranks | None = None
        self._is_shared = False
        self._background = Background()
        self._deletion = Background()
        self._tracking = Tracking(self._root)
        self._links: dict[int, int | None] = {}
        self.bytes_read = 0
        """Bytes of files that this process read in the last load."""

    def steps(self) -> list[int]:
        """Find the complete checkpoints.

        Returns:
            Their steps, ascending.
        """
        return self._storage.steps()

    def latest(self) -> int | None:
        """Find the newest complete checkpoint.

        Returns:
            Its step, the highest one; None if there is none.
        """
        return max(self.steps(), default=None)

    @torch.inference_mode(False)
    def save(self, step: int, parts: Mapping[str, object], *, delta: bool = False) -> Location:
        """Save the parts as one checkpoint.

        It is written under a temporary name, forced to the disk, and renamed: a crash at any moment leaves the
        checkpoints before it whole, and its remains are removed by the next save. All ranks call this alike.

        With ``delta``, tables write only rows that were looked up in training, updated, inserted or removed since this
        saver's last save, and the checkpoint builds on that one; all else is written whole. The first save with
        ``delta`` is whole, as is one whose earlier checkpoint is gone: from then on the tables note the ids that are
        erased, evicted and inserted by hand, 8 bytes each until the next save, and a copy of admission's counts.

        Args:
            step: Number of the step, from 0 to 10**18 - 1, above all steps saved in the directory, so that the latest
                is the one that was written last.
            parts: What to save, by name.
            delta: Whether to write just what changed, where that is possible.

        Returns:
            Directory of the checkpoint; with ``async_save`` it may not be there yet.

        Raises:
            CheckpointError: A part cannot be saved, the step is not above the latest, another job saves in the
                directory, not all ranks see it, the files cannot be written, another rank failed, or the save before
                this one failed in the background.
        """
        ranks = self._joined()
        ranks.together(self.wait)
        adapters: dict[str, Part] = {}

        def prepare() -> JSON:
            checked = self._checked_step(step)
            check_flag("Saver.save", "delta", delta)
            _check_parts("Saver.save", parts)
            adapters.update({name: part_of(name, part) for name, part in parts.items()})
            if ranks.rank == 0:
                self._storage.take()
            return [checked, delta, [[name, part.kind, _is_per_rank(parts[name])] for name, part in adapters.items()]]

        answers = ranks.together(prepare)
        if any(answer != answers[0] for answer in answers):
            raise CheckpointError(f"Saver.save: all ranks must save the same step and parts, they save {answers}.")
        if not self._is_shared:
            refuse_unshared(self._root, ranks)
            self._is_shared = True
        self._tracking.on |= delta
        link, changes = self._tracking.changes(ranks, adapters) if delta else (None, {})
        captured: dict[str, CapturedPart] = {}
        watches: dict[str, object] = {}

        def capture() -> None:
            if self._memory is not None:
                self._memory.reuse()
            for name, part in adapters.items():
                state = part.capture(self._memory, changes.get(name))
                captured[name] = CapturedPart(part.kind, state, _is_per_rank(parts[name]))
            watches.update(self._tracking.watch(adapters))

        ranks.together(capture)
        write = partial(self._write, int(step), captured, link, watches)
        if self._memory is None:
            write()
        else:
            self._background.start(f"the save of step {step} in {self._root}", write)
        return self._root / step_name(int(step))

    @torch.inference_mode(False)
    def wait(self) -> None:
        """Wait for a save in the background, and until the files of checkpoints that were given up are gone.

        Raises:
            CheckpointError: It failed; the checkpoints before it are whole.
        """
        self._background.wait()
        self._deletion.wait()

    def _write(
        self, step: int, parts: Mapping[str, CapturedPart], link: Link | None, watches: dict[str, object]
    ) -> None:
        ranks = self._joined()
        write_checkpoint(self._storage, ranks, step, parts, link)
        self._tracking.start_from(ranks, step, watches)
        self._links[step] = None if link is None else link.step

        def delete_oldest() -> None:
            if ranks.rank == 0 and self._keep is not None:
                for old in superfluous(self._root, self.steps(), self._keep, self._links):
                    self._deletion.start(f"the deletion of step {old} in {self._root}", self._storage.remove(old))

        ranks.together(delete_oldest)

    @torch.inference_mode(False)
    def load(self, parts: Mapping[str, object], step: int | Literal["latest"] = "latest") -> int:
        """Load parts of a checkpoint into live objects.

        The files of the parts are verified first (list, sizes, checksums, structure), then compared with the objects;
        only if all is sound is anything changed. Rows of an ``EmbeddingEngine`` are verified as they are read: tables
        that hold rows are replaced only after their files were read once for that, tables without rows take them at
        once and are empty again if a file is damaged. Parts that the checkpoint has and the call does not name are left
        alone. All ranks call this alike, and each reads the rows of its own buckets.

        Tables may be of another placement, dtype, coalescing or optimizer than they were: values are converted,
        optimizer state is taken where name and width agree, and what is missing starts with its first value, of which a
        warning tells.

        Args:
            parts: The objects to load into, by the names under which they were saved. JSON is read by ``read_json``.
            step: Which checkpoint; the highest complete step by default.

        Returns:
            The step that was loaded.

        Raises:
            CorruptCheckpoint: A file is missing, unknown or changed.
            CheckpointMismatch: The checkpoint is one of another model, or lacks a part.
            CheckpointError: There is no such checkpoint, it has another format version, or a part cannot be loaded.
        """
        ranks = self._joined()
        ranks.together(self.wait)
        _check_parts("Saver.load", parts)
        found: int = ranks.together(lambda: self._resolve(step) if ranks.rank == 0 else None)[0]
        reads, opened = Reads(), list[StoredCheckpoint]()
        chosen: dict[str, PartToLoad] = {}

        def choose() -> None:
            opened.append(StoredCheckpoint(self._root, found, listed=ranks.rank == 0))
            for name, value in parts.items():
                saved = name_of_rank(name, value, opened[0].manifest, ranks.rank)
                if saved is not None:
                    adapter = part_of(name, value)
                    chosen[name] = PartToLoad(adapter, saved, opened[0].part(saved, adapter.kind))

        try:
            ranks.together(choose)
            changed = load_parts(opened[0], ranks, chosen, reads)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{error} {other_steps(self._root, self.steps(), found, str(error))}") from error
        finally:
            self.bytes_read = reads.bytes
        # Keep tracking after loading an incremental checkpoint.
        self._tracking.on |= opened[0].manifest.previous is not None
        same = {name: each.part for name, each in chosen.items() if name not in changed}
        self._tracking.start_from(ranks, found, self._tracking.watch(same))
        return found

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
        """Load some tables of an engine and some tensors of modules, from a checkpoint of this or of another model.

        Names are those of tables, and of parameters and buffers. Patterns have ``*``, ``?`` and ``[...]``. All that is
        selected is verified and compared before anything is changed; what is not selected stays as it was. Rows keep
        their optimizer state. A table that has done no step goes on from those of its rows; else their steps become the
        table's own, as if they had just been met.

        Args:
            parts: The engines and modules to load into, by the names under which they were saved.
            step: Which checkpoint; the highest complete step by default.
            only: Patterns of the names to load; None for all.
            exclude: Patterns of names to leave out.
            rename: Names in the checkpoint and in the live object, with ``*``: ``{"encoder.*": "tower.*"}``.
            strict: Whether every selected name must be in both, in the same form. Else what fits is loaded: embeddings
                of the same width whatever their dtype, with the optimizer state that both have.

        Returns:
            What was loaded and what not.

        Raises:
            CorruptCheckpoint: A file is missing, unknown or changed.
            CheckpointMismatch: Strict, and something selected does not fit; or the checkpoint lacks a part.
            CheckpointError: There is no such checkpoint, a part is neither an engine nor a module, or a pattern of
                ``only``, ``exclude`` or ``rename`` matches no name of any part, whether strict or not.
        """
        ranks = self._joined()
        ranks.together(self.wait)
        _check_parts("Saver.load_some", parts)
        selection = Selection(only, exclude, rename)
        found: int = ranks.together(lambda: self._resolve(step) if ranks.rank == 0 else None)[0]
        adapters = {name: part_of(name, value) for name, value in parts.items()}
        opened: list[StoredCheckpoint] = []

        def find() -> None:
            opened.append(StoredCheckpoint(self._root, found, listed=ranks.rank == 0))
            for name, part in adapters.items():
                opened[0].part(name, part.kind)

        try:
            ranks.together(find)
            return load_some(opened[0], ranks, adapters, selection, strict)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{error} {other_steps(self._root, self.steps(), found, str(error))}") from error

    def read_json(self, name: str, step: int | Literal["latest"] = "latest") -> JSON:
        """Read a JSON value that was saved as a part.

        Args:
            name: Name of the part.
            step: Which checkpoint; the highest complete step by default.

        Returns:
            The value.

        Raises:
            CorruptCheckpoint: A file is missing, unknown or changed.
            CheckpointMismatch: The checkpoint has no such part, or it is no JSON value.
            CheckpointError: There is no such checkpoint, or it has another format version.
        """
        self.wait()
        found = self._resolve(step)
        try:
            checkpoint = StoredCheckpoint(self._root, found)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{error} {other_steps(self._root, self.steps(), found, str(error))}") from error
        return checkpoint.part(name, "json").meta.get("value")

    def _joined(self) -> Ranks:
        """Return this process and the others; collective, as the first call makes a group."""
        if self._ranks is None:
            self._ranks = Ranks.of(self._group)
        return self._ranks

    def _checked_step(self, step: int) -> int:
        if not isinstance(step, Integral) or isinstance(step, bool) or not 0 <= step <= _LARGEST_STEP:
            raise CheckpointError(f"Saver.save: step must be an integer from 0 to {_LARGEST_STEP}, got {step!r}.")
        latest = self.latest() if self._joined().rank == 0 else None
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
                "first, or name one of these."
            )
        return wanted


def _check_parts(where: str, parts: object) -> None:
    """Raise CheckpointError unless parts are a mapping from names to objects, of one at least."""
    if not isinstance(parts, Mapping) or not parts or not all(isinstance(name, str) for name in parts):
        got = list(parts) if isinstance(parts, Mapping) else type(parts).__name__
        raise CheckpointError(
            f"{where}: parts must be a mapping from one name or more to objects, as {{'model': model}}, got {got}."
        )


def _is_per_rank(part: object) -> bool:
    return isinstance(part, PerRank)
