"""Chains of bundles: a full one, and updates that each name the one before by step and digest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from recis_hybrid.serving.errors import ServingError
from recis_hybrid.serving.files import files_of, parse_manifest, verify_file

MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d{6,18})")


class Position(NamedTuple):
    """A bundle or an update."""

    step: int
    digest: str
    """SHA-256 of the manifest, in hexadecimal."""


class Link(NamedTuple):
    """A full bundle or an update, whose files are verified and on this machine."""

    path: Path
    position: Position
    document: dict[str, Any]
    """The manifest."""
    is_full: bool


class Chain:
    """The bundles in a folder, in order.

    Args:
        root: Folder or URL of an object store that pyarrow or fsspec supports.
        cache: Folder for copies of the files of an object store; None: a temporary folder, deleted at the end of the
            process.

    Raises:
        ServingError: The URL cannot be opened, or a package for it is not installed.
    """

    def __init__(self, root: str | os.PathLike[str], *, cache: str | os.PathLike[str] | None = None) -> None:
        text = os.fspath(root)
        self._store: _Store = _Remote(text, cache) if "://" in text else _Local(Path(text))
        self._root = text
        self._seen: set[int] = set()

    def newer(self, at: Position | None) -> Iterator[Link]:
        """Yield what follows a position: the newest full bundle, if it is newer, and all updates after it.

        Args:
            at: The bundle or update that the caller has; None for none.

        Raises:
            ServingError: What comes next is missing, damaged, or belongs to another chain. What was yielded before is
                sound.
        """
        steps = self._store.steps()
        first = -1 if at is None else at.step
        if at is not None:
            self._refuse_replaced(at, steps)
        manifests = [self._manifest(step) for step in steps if step > first]
        self._seen.update(steps)
        # A newer full bundle starts a new chain, whatever is before it.
        full = [number for number, manifest in enumerate(manifests) if manifest.previous is None and not manifest.error]
        if at is None and not full:
            for manifest in manifests:
                if manifest.error is not None:
                    raise manifest.error
            raise ServingError(
                f"{self._root} holds no full bundle{f', only updates of the steps {steps}' if steps else ''}. Write "
                f"one with `recis-hybrid export RUN --bundle {self._root}`."
            )
        for manifest in manifests[full[-1] if full else 0 :]:
            if manifest.error is not None:
                raise manifest.error
            if manifest.previous is not None:
                assert at is not None
                _refuse_other(self._root, manifest.position.step, manifest.previous, at)
            path = self._store.fetch(manifest.position.step, manifest.raw, manifest.document)
            _verify(path, manifest.document)
            yield Link(path, manifest.position, manifest.document, manifest.previous is None)
            at = manifest.position

    def _refuse_replaced(self, at: Position, steps: list[int]) -> None:
        late = [step for step in steps if step < at.step and step not in self._seen]
        if self._seen and late:
            raise ServingError(
                f"{self._root}: step {late[0]} has appeared, but step {at.step} with the SHA-256 {at.digest} has been "
                f"applied before. Updates must be written in order; delete it, or write a full bundle."
            )
        if steps and steps[-1] < at.step:
            raise ServingError(
                f"{self._root}: step {steps[-1]} is the latest, but step {at.step} with the SHA-256 {at.digest} has "
                f"been applied. Put it back, write a full bundle of a later step, or start anew."
            )
        if at.step in steps:
            found = hashlib.sha256(self._store.manifest(at.step)).hexdigest()
            if found != at.digest:
                raise ServingError(
                    f"{self._root}: step {at.step} has been replaced since it was applied: the SHA-256 of its manifest "
                    f"must be {at.digest}, is {found}. Put it back, or write a full bundle."
                )

    def _manifest(self, step: int) -> _Manifest:
        raw = self._store.manifest(step)
        position = Position(step, hashlib.sha256(raw).hexdigest())
        where = Path(self._root) / _name(step) / MANIFEST
        try:
            document = parse_manifest(where, raw)
            if document["step"] != step:
                raise ServingError(f"{where}: must be of step {step}, is of step {document['step']}. Export it again.")
            link = document.get("previous")
            previous = None if link is None else Position(int(link["step"]), str(link["sha256"]))
        except (ServingError, KeyError, TypeError, ValueError) as error:
            wrapped = error if isinstance(error, ServingError) else ServingError(f"{where}: is not valid: {error!r}.")
            return _Manifest(position, raw, {}, None, wrapped)
        return _Manifest(position, raw, document, previous, None)


class _Manifest(NamedTuple):
    position: Position
    raw: bytes
    document: dict[str, Any]
    previous: Position | None
    error: ServingError | None
    """Why the manifest cannot be read."""


class _Store(Protocol):
    def steps(self) -> list[int]:
        """Return the steps of complete bundles and updates, ascending."""

    def manifest(self, step: int) -> bytes:
        """Return a manifest."""

    def fetch(self, step: int, raw: bytes, document: dict[str, Any]) -> Path:
        """Return a local folder with the files of a step."""


class _Local:
    def __init__(self, root: Path) -> None:
        self._root = root

    def steps(self) -> list[int]:
        if not self._root.is_dir():
            raise ServingError(f"{self._root} is not a directory. Pass the output of `recis-hybrid export --bundle`.")
        found = [(match, entry) for entry in self._root.iterdir() if (match := _STEP.fullmatch(entry.name))]
        return sorted(int(match[1]) for match, entry in found if (entry / MANIFEST).is_file())

    def manifest(self, step: int) -> bytes:
        return (self._root / _name(step) / MANIFEST).read_bytes()

    def fetch(self, step: int, raw: bytes, document: dict[str, Any]) -> Path:
        return self._root / _name(step)


class _Remote:
    def __init__(self, url: str, cache: str | os.PathLike[str] | None) -> None:
        self._fs, root = _file_system(url)
        self._root = root.rstrip("/")
        self._cache = Path(tempfile.mkdtemp(prefix="recis-hybrid-") if cache is None else cache)
        self._is_temporary, self._applied = cache is None, list[Path]()
        if cache is None:
            weakref.finalize(self, shutil.rmtree, self._cache, ignore_errors=True)

    def steps(self) -> list[int]:
        self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return []
        names = [str(name).rstrip("/").rpartition("/")[2] for name in self._fs.ls(self._root, detail=False)]
        found = {int(match[1]): name for name in names if (match := _STEP.fullmatch(name))}
        return sorted(step for step, name in found.items() if self._fs.exists(f"{self._root}/{name}/{MANIFEST}"))

    def manifest(self, step: int) -> bytes:
        data: bytes = self._fs.cat_file(f"{self._root}/{_name(step)}/{MANIFEST}")
        return data

    def fetch(self, step: int, raw: bytes, document: dict[str, Any]) -> Path:
        path = self._cache / _name(step)
        for old in self._applied:
            shutil.rmtree(old, ignore_errors=True)
        # Updates are read into memory before the next one is fetched; a full bundle stays memory-mapped.
        self._applied = [path] if self._is_temporary and "previous" in document else []
        if path.is_dir() and (path / MANIFEST).read_bytes() == raw:
            return path
        partial = self._cache / f".{_name(step)}.partial"
        for old in (path, partial):
            shutil.rmtree(old, ignore_errors=True)
        for file in files_of(document):
            (partial / file["path"]).parent.mkdir(parents=True, exist_ok=True)
            try:
                self._fs.get_file(f"{self._root}/{_name(step)}/{file['path']}", str(partial / file["path"]))
            except FileNotFoundError as error:
                raise ServingError(f"{self._root}/{_name(step)}/{file['path']} is missing. Export it again.") from error
        partial.mkdir(parents=True, exist_ok=True)
        (partial / MANIFEST).write_bytes(raw)
        os.replace(partial, path)
        return path


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system and the path of a URL: pyarrow's if it has one, as for the trainer, else fsspec's."""
    try:
        from fsspec.core import url_to_fs
        from fsspec.implementations.arrow import ArrowFSWrapper

        with contextlib.suppress(ImportError):
            from pyarrow import ArrowInvalid, ArrowNotImplementedError
            from pyarrow.fs import FileSystem

            with contextlib.suppress(ArrowInvalid, ArrowNotImplementedError):
                found, path = FileSystem.from_uri(url)
                return ArrowFSWrapper(found), path
        store, root = url_to_fs(url, use_listings_cache=False)
        return store, root
    except (ImportError, ValueError, OSError) as error:
        raise ServingError(
            f"{url} cannot be opened: {error}. Install pyarrow, or fsspec's package for the URL, and fsspec."
        ) from error


def _verify(path: Path, document: dict[str, Any]) -> None:
    for file in files_of(document):
        try:
            verify_file(path, file)
        except OSError as error:
            raise ServingError(f"{path / file['path']}: cannot be read: {error}. Export it again.") from error


def _refuse_other(root: str, step: int, previous: Position, at: Position) -> None:
    """Raise ServingError unless an update builds on the position that the caller has."""
    if previous == at:
        return
    if previous.step > at.step:
        found, remedy = "which is missing", "Put it back, or write a full bundle."
    else:
        found, remedy = "another chain", "Write a full bundle."
    raise ServingError(
        f"{root}: the update of step {step} builds on step {previous.step} with the SHA-256 {previous.digest}, "
        f"{found}; the last one applied is step {at.step} with the SHA-256 {at.digest}. {remedy}"
    )


def _name(step: int) -> str:
    return f"step_{step:06d}"
