"""State that a saver keeps between saves, so that the next one can write only changes."""

from __future__ import annotations

from collections.abc import Mapping

from recis_hybrid.checkpointing import JSON, PartState
from recis_hybrid.saver.checkpoint.chain import link_to
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.manifest import Link
from recis_hybrid.saver.parts.part import Part
from recis_hybrid.saver.runtime.ranks import Ranks


class Tracking:
    """The checkpoint of the last save or load, and records of what has changed in the live objects since.

    Nothing is recorded until ``enabled`` is set.

    Args:
        root: Directory of the checkpoints.
    """

    def __init__(self, root: Location) -> None:
        self.enabled = False
        self._root = root
        self._link: Link | None = None
        self._watches: dict[str, object] = {}

    def changes(self, ranks: Ranks, parts: Mapping[str, Part]) -> tuple[Link | None, dict[str, PartState]]:
        """Return the changes since the last checkpoint; collective.

        Args:
            ranks: This rank and the others.
            parts: The parts to save.

        Returns:
            The checkpoint that the next one can build on, None if there is none or it no longer exists; and the changes
            by part, without parts whose changes are unknown.
        """
        if not ranks.together(lambda: ranks.rank == 0 and self._base_exists())[0]:
            return None, {}
        found: dict[str, PartState] = {}
        whole: dict[str, set[str]] = {name: set() for name in self._watches.keys() & parts.keys()}

        def take() -> dict[str, JSON]:
            for name in sorted(whole):
                source = parts[name].tables
                state = None if source is None else source.checkpoint_changes(self._watches[name], whole[name])
                if state is not None:
                    found[name] = state
            return {
                name: [table for table, rows in state.tables.items() if rows.removed is None]
                for name, state in found.items()
            }

        answers = ranks.together(take)
        # All ranks or none must know the changes of a part, and a table must be whole on all ranks or on none.
        common = set.intersection(*(set(answer) for answer in answers))
        for name in found.keys() - common:
            del found[name]
        whole = {name: {table for answer in answers for table in answer[name]} for name in common}
        whole = {name: tables for name, tables in whole.items() if any(set(a[name]) != tables for a in answers)}
        if whole:
            ranks.together(take)
        return self._link, found

    def watch(self, parts: Mapping[str, Part]) -> dict[str, object]:
        """Start to record changes of parts, and return the records by part; empty unless enabled."""
        sources = {name: part.tables for name, part in parts.items()} if self.enabled else {}
        return {name: source.watch_checkpoint_changes() for name, source in sources.items() if source is not None}

    def start_from(self, ranks: Ranks, step: int, watches: dict[str, object]) -> None:
        """Set the checkpoint that the next one can build on.

        Args:
            ranks: This rank and the others.
            step: Its step.
            watches: Records of the changes since then, by part.
        """
        self._link, self._watches = None, {}
        if self.enabled:
            # Rank 0 reads the manifest, because other machines may see it late.
            sha256 = ranks.together(lambda: link_to(self._root, step).sha256 if ranks.rank == 0 else None)[0]
            self._link, self._watches = Link(step, sha256), watches

    def _base_exists(self) -> bool:
        try:
            return self._link is not None and link_to(self._root, self._link.step) == self._link
        except OSError:
            return False
