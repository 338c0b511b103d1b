"""Follower: a live bundle that applies updates as they appear."""

from __future__ import annotations

import os
import threading
from typing import Any

from recis_hybrid.serving.bundle import Bundle
from recis_hybrid.serving.errors import ServingError
from recis_hybrid.serving.files import map_tensors
from recis_hybrid.serving.lookups import AnyTable
from recis_hybrid.serving.tables import IndexedTable, Table
from recis_hybrid.serving.updates.chain import Chain, Link, Position
from recis_hybrid.serving.updates.overlay import UpdatedTable, read_level


class Follower:
    """A bundle that follows a folder in which updates appear.

    Each version is a bundle of its own, which shares with the one before what has not changed. A reader that takes
    :attr:`bundle` once for each request sees one version, old or new.

    A follower has no state on disk. Started again after any crash, it reads the newest full bundle and the updates
    after it, and has the same rows, bit for bit.

    Args:
        path: Folder to which ``recis-hybrid export RUN --bundle`` writes a bundle and, with ``--update``, updates; or
            URL of a copy of it in an object store that pyarrow or fsspec supports.
        cache: Folder for copies of the files of an object store; None: a temporary one.
        threads: Threads of one run of an ONNX tower.

    Raises:
        ServingError: There is no full bundle, or it or the first update after it is damaged.

    Example:
        >>> follower = Follower("first/bundle")  # doctest: +SKIP
        >>> follower.bundle.predict({"user": [7], "item": [3]})  # doctest: +SKIP
        >>> follower.poll()  # None, unless there is an update  # doctest: +SKIP
    """

    bundle: Bundle
    """The newest version that has been applied."""

    def __init__(
        self, path: str | os.PathLike[str], *, cache: str | os.PathLike[str] | None = None, threads: int = 1
    ) -> None:
        self._chain, self._threads = Chain(path, cache=cache), threads
        self._position: Position | None = None
        self._lock = threading.Lock()
        self._base: _Base | None = None
        self.poll()

    @property
    def step(self) -> int:
        """Step of the newest version that has been applied."""
        return self.bundle.step

    @property
    def digest(self) -> str:
        """SHA-256 of its manifest."""
        return self.bundle.digest

    def poll(self) -> Bundle | None:
        """Apply the updates that have appeared; thread-safe.

        If one of them is damaged, those before it are applied, and the next call raises the error.

        Returns:
            The new bundle; None if there is no update.

        Raises:
            ServingError: The next update is missing, damaged, out of order, or belongs to another chain; the message
                has steps and digests. :attr:`bundle` stays as it is, and a later full bundle is applied nevertheless.
            OSError: The folder or the object store cannot be read. Call again later.
        """
        with self._lock:
            return self._poll()

    def _poll(self) -> Bundle | None:
        base = self._base
        last: Link | None = None
        failure: ServingError | None = None
        tables: dict[str, AnyTable] = {} if base is None else dict(self.bundle.tables)
        try:
            for link in self._chain.newer(self._position):
                if link.is_full:
                    base = _Base(link, Bundle(link.path, verify=False, threads=self._threads))
                    tables = dict(base.bundle.tables)
                else:
                    assert base is not None
                    tables = base.applied(link, tables)
                last = link
        except ServingError as error:
            failure = error
        if last is None or base is None:
            if failure is not None:
                raise failure
            return None
        self.bundle = base.bundle if last.is_full else base.version(last, tables)
        self._base, self._position = base, last.position
        return self.bundle


class _Base:
    """A full bundle, on which updates build."""

    def __init__(self, link: Link, bundle: Bundle) -> None:
        self.bundle = bundle
        self._model = _model_of(link)
        self._columns = {name: (entry["columns"], entry["meta"]) for name, entry in _tables_of(link).items()}

    def applied(self, link: Link, tables: dict[str, AnyTable]) -> dict[str, AnyTable]:
        """Return tables with the changes of an update."""
        if _model_of(link) != self._model:
            raise ServingError(
                f"{link.path}: the update has another model than the bundle of step {self.bundle.step}, on which it "
                f"builds. Write a full bundle."
            )
        entries = _tables_of(link)
        if {name: (entry["columns"], entry["meta"]) for name, entry in entries.items()} != self._columns:
            raise ServingError(
                f"{link.path}: the update has other tables, widths or dtypes than the bundle of step "
                f"{self.bundle.step}, on which it builds. Write a full bundle."
            )
        newer: dict[str, AnyTable] = {}
        for name, table in tables.items():
            entry = entries[name]
            if entry["removed"] is None:  # all rows of the table
                newer[name] = IndexedTable(Table(link.path, name, entry))
                continue
            level = read_level(link.path, name, entry)
            if isinstance(table, IndexedTable):
                table = UpdatedTable(table.table, table)
            assert isinstance(table, UpdatedTable)
            newer[name] = table.updated(level) if len(level.ids) else table
        return newer

    def version(self, link: Link, tables: dict[str, AnyTable]) -> Bundle:
        """Return the bundle of an update, with the tower of that update."""
        file = link.document["parts"]["tower"]["file"]
        tower = {} if file is None else map_tensors(link.path, file)
        position = link.position
        return self.bundle.updated(link.path, position.step, position.digest, tables, tower, _part_of(link))


def _part_of(link: Link) -> dict[str, Any]:
    value = link.document["parts"].get("bundle", {}).get("meta", {}).get("value")
    if not isinstance(value, dict) or not isinstance(value.get("tables"), dict) or "source" not in value:
        raise ServingError(f"{link.path}: is an export of tables, not a bundle. Write a full bundle.")
    return value


def _model_of(link: Link) -> dict[str, Any]:
    """Return what must not change in an update."""
    value = _part_of(link)
    tables = {name: {**table, "error": None} for name, table in value["tables"].items()}
    return {**value, "source": None, "tables": tables}


def _tables_of(link: Link) -> dict[str, dict[str, Any]]:
    return {name: table for part in link.document["parts"].values() for name, table in part["tables"].items()}
