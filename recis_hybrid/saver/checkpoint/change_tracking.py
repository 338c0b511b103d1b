"""State that a saver keeps between saves, so that the next one writes only changes."""

from __future__ import annotations

from collections.abc import Mapping

from recis_hybrid.checkpointing import JSON, PartState, SaveableTables
from recis_hybrid.saver.checkpoint.chain import link_to
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.manifest import Link
from recis_hybrid.saver.parts.part import Part, SaveablePart
from recis_hybrid.saver.runtime.ranks import Ranks


class Tracking:
    """The checkpoint that the live objects were last saved to or loaded from, and who notes what changed since.

    Nothing is noted until ``on`` is set.

    Args:
        root: The directory of the checkpoints.
    """

    def __init__(self, root: Location) -> None:
        self.on = False
        self._root = root
        self._link: Link | None = None
        self._watches: dict[str, object] = {}

    def changes(self, ranks: Ranks, parts: Mapping[str, Part]) -> tuple[Link | None, dict[str, PartState]]:
        """Take what changed, all ranks together.

        Args:
            ranks: This rank and the others.
            parts: The parts to be saved.

        Returns:
            What the next checkpoint can build on: None if there is nothing, or it is not there any more. And by part
            what changed since then; a part for which that cannot be told is left out.
        """
        if not ranks.together(lambda: ranks.rank == 0 and self._is_there())[0]:
            return None, {}
        found: dict[str, PartState] = {}
        whole: dict[str, set[str]] = {name: set() for name in self._watches.keys() & parts.keys()}

        def take() -> dict[str, JSON]:
            for name in sorted(whole):
                source = _source(parts[name])
                state = None if source is None else source.checkpoint_changes(self._watches[name], whole[name])
                if state is not None:
                    found[name] = state
            return {
                name: [table for table, rows in state.tables.items() if rows.removed is None]
                for name, state in found.items()
            }

        answers = ranks.together(take)
        # A part is told of by all ranks or by none, and a table is whole on all ranks or on none.
        common = set.intersection(*(set(answer) for answer in answers))
        for name in found.keys() - common:
            del found[name]
        whole = {name: {table for answer in answers for table in answer[name]} for name in common}
        whole = {name: tables for name, tables in whole.items() if any(set(a[name]) != tables for a in answers)}
        if whole:
            ranks.together(take)
        return self._link, found

    def watch(self, parts: Mapping[str, Part]) -> dict[str, object]:
        """Begin to note what changes in parts, for the checkpoint that is made of them now; by part, who notes."""
        sources = {name: _source(part) for name, part in parts.items()} if self.on else {}
        return {name: source.watch_checkpoint_changes() for name, source in sources.items() if source is not None}

    def start_from(self, ranks: Ranks, step: int, watches: dict[str, object]) -> None:
        """Take a checkpoint as the one that the next can build on.

        Args:
            ranks: This rank and the others.
            step: Its step.
            watches: By part, who has noted what changed since.
        """
        self._link, self._watches = None, {}
        if self.on:
            # Other machines may see the manifest late.
            sha256 = ranks.together(lambda: link_to(self._root, step).sha256 if ranks.rank == 0 else None)[0]
            self._link, self._watches = Link(step, sha256), watches

    def _is_there(self) -> bool:
        try:
            return self._link is not None and link_to(self._root, self._link.step) == self._link
        except OSError:
            return False


def _source(part: Part) -> SaveableTables | None:
    return part.value if isinstance(part, SaveablePart) and isinstance(part.value, SaveableTables) else None
