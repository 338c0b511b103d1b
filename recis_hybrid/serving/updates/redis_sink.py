"""RedisSink: the rows of a bundle's tables in Redis, followed by updates."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from recis_hybrid.serving.errors import ServingError
from recis_hybrid.serving.files import Array
from recis_hybrid.serving.tables import Table
from recis_hybrid.serving.updates.chain import Chain, Link, Position
from recis_hybrid.serving.updates.overlay import find, read_level

_ROWS = 2000
"""Rows of one MSET or UNLINK."""
_BATCHES = 8
"""Commands that are sent before their answers are read."""


class RedisSink:
    """Copies the rows of a folder of bundles and updates to Redis, for programs that look embeddings up there.

    The key of a row is ``PREFIX:TABLE:ID``, the id in decimal, and its value the embedding, float32 in little-endian
    order. ``PREFIX:version`` is the JSON object ``{"step": …, "digest": …}`` of the last bundle or update that is
    complete. It is written after the rows, and names what to apply next, so a sink that was killed continues where it
    was: at worst it writes the rows of one update again. While an update is written, readers see some of its rows.
    Features and towers are not copied.

    Args:
        path: Folder or URL of the bundles and updates, see :class:`Follower`.
        client: A ``redis.Redis`` client of one server, or its URL.
        prefix: Prefix of all keys, used by nothing else.
        cache: Folder for copies of the files of an object store; None: a temporary one.

    Raises:
        ServingError: redis is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        client: Any,
        prefix: str,
        *,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(client, str):
            try:
                import redis
            except ModuleNotFoundError as error:
                raise ServingError(
                    f"RedisSink: there is no module {error.name!r}; run `pip install recis_hybrid[redis]`"
                ) from error
            client = redis.Redis.from_url(client)
        self._chain, self._client, self._prefix = Chain(path, cache=cache), client, prefix
        self.rows = 0
        """Rows written and removed by this process."""

    def poll(self) -> int | None:
        """Copy the bundles and updates that have appeared.

        Returns:
            The step of the last one copied, or None if nothing is new.

        Raises:
            ServingError: The next update is missing, damaged, out of order, or belongs to another chain; those before
                it have been copied.
            redis.RedisError: The server does not answer. Call again later.
        """
        step = None
        for link in self._chain.newer(self.version()):
            for part in link.document["parts"].values():
                for name, entry in part["tables"].items():
                    if entry.get("removed") is None:
                        self._replace(link, name, entry)
                    else:
                        self._update(link, name, entry)
            step = link.position.step
            self._client.set(f"{self._prefix}:version", json.dumps(link.position._asdict()))
        return step

    def version(self) -> Position | None:
        """Return step and digest of the last bundle or update that is complete in Redis."""
        value = self._client.get(f"{self._prefix}:version")
        if value is None:
            return None
        try:
            found = json.loads(value)
            return Position(int(found["step"]), str(found["digest"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ServingError(
                f"{self._prefix}:version in Redis is not a version: {value!r}. Use a prefix of its own."
            ) from error

    def _update(self, link: Link, name: str, entry: dict[str, Any]) -> None:
        level = read_level(link.path, name, entry)
        table = Table(link.path, name, entry)
        rows = np.flatnonzero(level.exists)
        self._write(name, level.ids[rows], table.vectors(level.columns, rows))
        self._remove(name, level.ids[~level.exists])

    def _replace(self, link: Link, name: str, entry: dict[str, Any]) -> None:
        """Write all rows of a table, and remove those of ids without a row."""
        table = Table(link.path, name, entry)
        kept = []
        for tensors in table.open():
            ids = tensors["ids"].values
            kept.append(ids)
            for first in range(0, len(ids), _ROWS * _BATCHES):
                rows = np.arange(first, min(first + _ROWS * _BATCHES, len(ids)))
                self._write(name, ids[rows], table.vectors(tensors, rows))
        present = np.sort(np.concatenate([np.empty(0, np.int64), *kept]))
        for found in self._ids(name):
            self._remove(name, found[~find(present, found)[1]])

    def _ids(self, name: str) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the ids of a table's keys in Redis."""
        start = f"{self._prefix}:{name}:"
        pattern = "".join(f"\\{letter}" if letter in "*?[]\\^" else letter for letter in start) + "*"
        cursor = 0
        while True:
            cursor, keys = self._client.scan(cursor, match=pattern, count=_ROWS)
            texts = [(key if isinstance(key, str) else key.decode())[len(start) :] for key in keys]
            ids = [int(text) for text in texts if text.removeprefix("-").isdecimal()]
            yield np.array(ids, np.int64)
            if int(cursor) == 0:
                return

    def _write(self, name: str, ids: Array, vectors: Array) -> None:
        data = np.ascontiguousarray(vectors, "<f4")
        size = data.shape[1] * 4
        raw = data.tobytes()
        keys = [f"{self._prefix}:{name}:{each}" for each in ids.tolist()]
        values = [raw[at : at + size] for at in range(0, len(raw), size)]
        with self._client.pipeline(transaction=False) as pipeline:
            for first in range(0, len(keys), _ROWS):
                part = slice(first, first + _ROWS)
                pipeline.mset(dict(zip(keys[part], values[part], strict=True)))
                if len(pipeline) == _BATCHES:
                    pipeline.execute()
            pipeline.execute()
        self.rows += len(keys)

    def _remove(self, name: str, ids: Array) -> None:
        keys = [f"{self._prefix}:{name}:{each}" for each in ids.tolist()]
        with self._client.pipeline(transaction=False) as pipeline:
            for first in range(0, len(keys), _ROWS):
                pipeline.unlink(*keys[first : first + _ROWS])
            pipeline.execute()
        self.rows += len(keys)
