"""What a saver remembers between saves, for the next one to write just what has changed."""

from collections.abc import Mapping
from pathlib import Path

from recis_hybrid.saver.adapters import Part, SaveablePart
from recis_hybrid.saver.chain import link_to
from recis_hybrid.saver.manifest import Link
from recis_hybrid.saver.protocol import HasChanges, PartState


class Tracking:
    """The checkpoint that the live objects were last saved to or loaded from, and who notes what changed since.

    Nothing is noted until `on` is set.

    Args:
        root: the directory of the checkpoints.
    """

    def __init__(self, root: Path) -> None:
        self.on = False
        self._root = root
        self._link: Link | None = None
        self._watches: dict[str, object] = {}

    def link(self) -> Link | None:
        """Return the checkpoint that the next one can build on: None if there is none, or it is not there any more."""
        link = self._link
        try:
            return link if link is not None and link_to(self._root, link.step) == link else None
        except OSError:
            return None

    def state(self, name: str, part: Part, link: Link | None, watches: dict[str, object]) -> PartState:
        """Take the state of a part.

        Args:
            name: of the part.
            part: the part.
            link: the checkpoint that it is to build on; None for a whole state.
            watches: takes, by part, who notes from now on what changes.

        Returns:
            What changed since, or the whole state where that cannot be told.
        """
        source = _source(part)
        state = None
        if source is not None and link is not None and name in self._watches:
            state = source.checkpoint_changes(self._watches[name])
        if state is None:
            state = part.state()
        self._watch(name, part, watches)
        return state

    def settle(self, step: int, watches: dict[str, object]) -> None:
        """Take a checkpoint as the one that the next can build on.

        Args:
            step: its step.
            watches: by part, who has noted what changed since.
        """
        self._link, self._watches = (link_to(self._root, step), watches) if self.on else (None, {})

    def loaded(self, step: int, parts: Mapping[str, Part]) -> None:
        """Take a checkpoint whose parts have just been loaded, whole, as the one that the next can build on."""
        watches: dict[str, object] = {}
        for name, part in parts.items():
            self._watch(name, part, watches)
        self.settle(step, watches)

    def _watch(self, name: str, part: Part, watches: dict[str, object]) -> None:
        source = _source(part)
        if self.on and source is not None:
            watches[name] = source.watch_checkpoint_changes()


def _source(part: Part) -> HasChanges | None:
    return part.value if isinstance(part, SaveablePart) and isinstance(part.value, HasChanges) else None
