"""`Saver`: checkpoints that appear whole or not at all, and are verified before anything is changed."""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist

from recis_hybrid.saver.adapters import Part, copied, part_of
from recis_hybrid.saver.background import Background
from recis_hybrid.saver.directory import read_manifest, step_name
from recis_hybrid.saver.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint
from recis_hybrid.saver.files import Location
from recis_hybrid.saver.loading import load_parts
from recis_hybrid.saver.manifest import MANIFEST, Manifest, PartEntry, dump_manifest
from recis_hybrid.saver.part_files import write_part, write_part_of_each
from recis_hybrid.saver.per_rank import PerRank, name_of_rank
from recis_hybrid.saver.protocol import JSON, PartState
from recis_hybrid.saver.ranks import Ranks
from recis_hybrid.saver.row_files import Reads
from recis_hybrid.saver.shared import refuse_unshared
from recis_hybrid.saver.snapshot import Memory
from recis_hybrid.saver.storage import storage_of

_LARGEST_STEP = 10**18 - 1


class Saver:
    """Saves and loads the state of a training run in one directory.

    A part is an object that implements `Saveable`, a `torch.nn.Module`, a `torch.optim.Optimizer`, a `torch.Generator`,
    an object with `state_dict` and `load_state_dict` (a scheduler, a scaler, a `ColumnDataset`), or a JSON value.
    Files are safetensors and JSON, as docs/format.md specifies; nothing that is read is ever executed.

    One job saves in a directory at a time; a second is refused until the first has ended or its saver is gone.

    In a job of several processes all of them call `save` and `load` alike, and read and write in parallel: each its own
    buckets of tables (`recis_hybrid.state.owned_buckets`), whatever the world size was when they were saved. All other
    parts are the same on all ranks, and rank 0's are saved, but for those in a `PerRank`. If one rank fails, all raise.
    The reading position of a `ColumnDataset` is the same on all ranks, and needs no `PerRank`.

    Args:
        path: directory of the checkpoints, which all ranks see, made at the first save; or a URL of an object store or
            another file system that pyarrow or fsspec know, such as `s3://bucket/run`. There a checkpoint is complete
            once its manifest is written, and who saves last takes over from a job that saved there before.
        keep: how many checkpoints to keep, or None for all; the oldest are deleted after a new one is in place.
        async_save: whether `save` returns once it has copied the state, which a thread then writes. The next call of
            this saver waits for it and raises what went wrong; so does the end of the process, on stderr. The memory
            of the copy is kept for the next one.
        group: a gloo process group of the processes that save together, used by nothing else; None makes one of all
            processes where torch.distributed has several.

    Raises:
        CheckpointError: nothing is known to read such a URL, or `keep` is no positive integer.

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

    def __init__(
        self, path: str | os.PathLike[str], *, keep: int | None = 5, async_save: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        if keep is not None and (type(keep) is not int or keep < 1):
            raise CheckpointError(f"Saver: keep must be an integer of at least 1, or None, got {keep!r}.")
        self._storage = storage_of(path)
        self._root = self._storage.root
        self._keep = keep
        self._async_save = async_save
        self._group = group
        self._ranks: Ranks | None = None
        self._shared = False
        self._background = Background()
        self._deletion = Background()
        self._memory = Memory()
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

    def save(self, step: int, **parts: object) -> Location:
        """Save the parts as one checkpoint.

        It is written under a temporary name, forced to the disk, and renamed: a crash at any moment leaves the
        checkpoints before it whole, and its remains are removed by the next save. All ranks call this alike.

        Args:
            step: number of the step, from 0 to 10**18 - 1, above all steps saved in the directory, so that the latest
                is the one that was written last.
            **parts: what to save, by name.

        Returns:
            Directory of the checkpoint; with `async_save` it may not be there yet.

        Raises:
            CheckpointError: a part cannot be saved, the step is not above the latest, another job saves in the
                directory, not all ranks see it, the files cannot be written, another rank failed, or the save before
                this one failed in the background.
        """
        ranks = self._together()
        ranks.together(self.wait)
        adapters: dict[str, Part] = {}

        def prepare() -> JSON:
            self._check_step(step)
            if not parts:
                raise CheckpointError("Saver.save: there must be a part to save, got none. Pass parts by name.")
            adapters.update({name: part_of(name, _value(part)) for name, part in parts.items()})
            if ranks.rank == 0:
                self._storage.take()
            return [step, [[name, part.kind, isinstance(parts[name], PerRank)] for name, part in adapters.items()]]

        answers = ranks.together(prepare)
        if any(answer != answers[0] for answer in answers):
            raise CheckpointError(f"Saver.save: all ranks must save the same step and parts, they save {answers}.")
        if not self._shared:
            refuse_unshared(self._root, ranks)
            self._shared = True
        shares = {name: isinstance(part, PerRank) for name, part in parts.items()}
        if self._async_save:
            states: dict[str, Callable[[], PartState]] = {}

            def copy() -> None:
                self._memory.reuse()
                states.update({name: copied(part, self._memory) for name, part in adapters.items()})

            ranks.together(copy)
            work = [(name, part.kind, states[name], shares[name]) for name, part in adapters.items()]
            self._background.start(f"the save of step {step} in {self._root}", partial(self._write, step, work))
        else:
            self._write(step, [(name, part.kind, part.state, shares[name]) for name, part in adapters.items()])
        return self._directory(step)

    def wait(self) -> None:
        """Wait for a save in the background, and until the files of checkpoints that were given up are gone.

        Raises:
            CheckpointError: it failed; the checkpoints before it are whole.
        """
        self._background.wait()
        self._deletion.wait()

    def _write(self, step: int, parts: Iterable[tuple[str, str, Callable[[], PartState], bool]]) -> None:
        ranks = self._together()
        storage, first = self._storage, ranks.rank == 0
        folder = storage.folder(step)
        entries: dict[str, PartEntry] = {}

        def commit() -> None:
            if first:
                storage.commit(step, dump_manifest(Manifest(step, ranks.size, entries, _about())))

        try:
            ranks.together(lambda: storage.begin(step) if first else None)
            for name, kind, hand_out, of_each in parts:
                if of_each:
                    entries.update(write_part_of_each(folder, ranks, name, kind, hand_out))
                else:
                    entries[name] = write_part(folder, ranks, name, kind, hand_out)
            ranks.together(commit)
        except BaseException as error:
            if first:
                storage.abandon(step)
            if isinstance(error, OSError):
                raise CheckpointError(
                    f"{folder}: could not be written ({error}). Make room, or save elsewhere."
                ) from error
            raise

        def clean() -> None:
            if first:
                storage.settle()
                self._delete_oldest()

        ranks.together(clean)

    def load(self, step: int | Literal["latest"] = "latest", **parts: object) -> int:
        """Load parts of a checkpoint into live objects.

        The files of the parts are verified first (list, sizes, checksums, structure), then compared with the objects;
        only if all is sound is anything changed. Rows of an `EmbeddingEngine` are verified as they are read: tables
        that hold rows are replaced only after their files were read once for that, tables without rows take them at
        once and are empty again if a file is damaged. Parts that the checkpoint has and the call does not name are left
        alone. All ranks call this alike, and each reads the rows of its own buckets.

        Tables may be of another placement, dtype, coalescing or optimizer than they were: values are converted,
        optimizer state is taken where name and width agree, and what is missing starts with its first value, of which a
        warning tells.

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
        ranks = self._together()
        ranks.together(self.wait)
        if not parts:
            raise CheckpointError("Saver.load: there must be a part to load, got none. Pass parts by name.")
        found: int = ranks.together(lambda: self._resolve(step) if ranks.rank == 0 else None)[0]
        directory, reads = self._directory(found), Reads()
        chosen: dict[str, tuple[Part, str, PartEntry]] = {}

        def choose() -> None:
            manifest = read_manifest(directory, found, listed=ranks.rank == 0)
            for name, value in parts.items():
                saved = name_of_rank(name, value, manifest, ranks.rank)
                if saved is not None:
                    adapter = part_of(name, _value(value))
                    chosen[name] = adapter, saved, _entry(directory, manifest, saved, adapter.kind)

        try:
            ranks.together(choose)
            load_parts(directory, ranks, chosen, reads)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{error} {self._others(found)}") from error
        finally:
            self.bytes_read = reads.bytes
        return found

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
        directory = self._directory(found)
        try:
            manifest = read_manifest(directory, found)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{error} {self._others(found)}") from error
        return _entry(directory, manifest, name, "json").meta.get("value")

    def _together(self) -> Ranks:
        """This process and the others; all of them call this alike, for the first call makes a group."""
        if self._ranks is None:
            self._ranks = Ranks.of(self._group)
        return self._ranks

    def _check_step(self, step: int) -> None:
        if type(step) is not int or not 0 <= step <= _LARGEST_STEP:
            raise CheckpointError(f"Saver.save: step must be an integer from 0 to {_LARGEST_STEP}, got {step!r}.")
        latest = self.latest() if self._together().rank == 0 else None
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"Saver.save: step must be above the latest one in {self._root}, {latest}, got {step}. Save to another "
                "directory, or delete the later checkpoints first."
            )

    def _directory(self, step: int) -> Location:
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

    def _others(self, step: int) -> str:
        others = [other for other in self.steps() if other != step]
        return f"Other steps in {self._root}: {others}." if others else f"There is no other step in {self._root}."

    def _delete_oldest(self) -> None:
        if self._keep is None:
            return
        for step in self.steps()[: -self._keep]:
            self._deletion.start(f"the deletion of step {step} in {self._root}", self._storage.give_up(step))


def _entry(directory: Location, manifest: Manifest, name: str, kind: str) -> PartEntry:
    entry = manifest.parts.get(name)
    where = f"{directory / MANIFEST}: part {name!r}"
    if entry is None:
        raise CheckpointMismatch(
            f"{where} must be in the checkpoint, which has {sorted(manifest.parts)}. Leave it out, or save it first."
        )
    if entry.kind != kind:
        remedy = "Use Saver.read_json." if entry.kind == "json" else "Pass the object that was saved under this name."
        raise CheckpointMismatch(f"{where} was saved from a {entry.kind}, but a {kind} was asked for. {remedy}")
    return entry


def _value(part: object) -> Any:
    return part.value if isinstance(part, PerRank) else part


def _about() -> dict[str, JSON]:
    try:
        own = importlib.metadata.version("recis_hybrid")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        own = "not installed"
    versions: dict[str, JSON] = {
        "python": platform.python_version(),
        "recis_hybrid": own,
        "safetensors": importlib.metadata.version("safetensors"),
        "torch": torch.__version__,
    }
    return {"wall_time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "versions": versions}
