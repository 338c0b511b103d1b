"""Which names of a checkpoint are loaded, and under which names of the live object."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase, translate

from recis_hybrid.saver.errors import CheckpointError, CheckpointMismatch

_MOST = 4


@dataclass(frozen=True)
class Loaded:
    """What a partial load did, by the names of the live objects but for `unused`; `part: name` each."""

    step: int | None
    """Of the checkpoint; None for files that are none."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Of the live objects, selected, but not in the checkpoint: they stayed as they were."""

    unused: list[str] = field(default_factory=list)
    """In the checkpoint, selected, but without a place in the live objects."""

    unfit: list[str] = field(default_factory=list)
    """In both, but of another form, which is said: they stayed as they were."""

    def refuse(self, where: str) -> None:
        """Raise if something was selected and has no counterpart, or another form.

        Args:
            where: what is loaded, for the message.

        Raises:
            CheckpointMismatch: there is; the first four of each kind are listed.
        """
        found = [
            *_some(self.unfit),
            *_some(self.unused, "in the checkpoint only"),
            *_some(self.missing, "in the live object only"),
        ]
        if found:
            raise CheckpointMismatch(
                f"{where} does not fit the live objects: {'; '.join(found)}. Nothing was loaded. Leave "
                "out what is not meant by `only` or `exclude`, give names by `rename`, or take what fits with "
                "strict=False."
            )


class Selection:
    """Patterns over names: `*`, `?` and `[...]` as in file names.

    Args:
        only: patterns of the names to take; None for all.
        exclude: patterns of names to leave out.
        rename: names that the checkpoint has, and those of the live object: `{"encoder.*": "tower.*"}`. The first
            pattern that matches counts; each `*` on the right takes what the `*` on the left of the same place matched.

    Raises:
        CheckpointError: a name on the right has more `*` than the pattern on its left.
    """

    def __init__(
        self, only: str | Sequence[str] | None, exclude: str | Sequence[str], rename: Mapping[str, str] | None
    ) -> None:
        self._only = None if only is None else _listed(only)
        self._exclude = _listed(exclude)
        self._rename: list[tuple[re.Pattern[str], list[str]]] = []
        for pattern, name in (rename or {}).items():
            pieces = name.split("*")
            if pattern.count("*") < len(pieces) - 1:
                raise CheckpointError(f"rename: {name!r} must have at most as many '*' as {pattern!r}. Write it out.")
            self._rename.append((_grouped(pattern), pieces))

    def takes(self, name: str) -> bool:
        """Whether a name is selected."""
        chosen = self._only is None or any(fnmatchcase(name, pattern) for pattern in self._only)
        return chosen and not any(fnmatchcase(name, pattern) for pattern in self._exclude)

    def live_name(self, name: str) -> str:
        """Return the name that the live object has for what the checkpoint calls `name`."""
        for pattern, pieces in self._rename:
            match = pattern.fullmatch(name)
            if match is not None:
                return pieces[0] + "".join(a + b for a, b in zip(match.groups(), pieces[1:], strict=False))
        return name

    def live_names(self, names: Iterable[str]) -> dict[str, str]:
        """Map selected names of a checkpoint.

        A name is selected by what the checkpoint calls it, or by what the live object does.

        Args:
            names: all of the checkpoint.

        Returns:
            Names of the checkpoint by names of the live object.

        Raises:
            CheckpointError: two get the same name.
        """
        found: dict[str, str] = {}
        for name in names:
            live = self.live_name(name)
            if self._chosen(name, live):
                if live in found:
                    raise CheckpointError(
                        f"rename: {found[live]!r} and {name!r} both become {live!r}. Rename one only."
                    )
                found[live] = name
        return found

    def _chosen(self, name: str, live: str) -> bool:
        wanted = self._only is None or any(fnmatchcase(n, p) for n in (name, live) for p in self._only)
        return wanted and not any(fnmatchcase(n, p) for n in (name, live) for p in self._exclude)


def _some(names: list[str], where: str = "") -> list[str]:
    shown = [f"{name} is {where}" if where else name for name in names[:_MOST]]
    return shown + ([f"and {len(names) - _MOST} more like these"] if len(names) > _MOST else [])


def _listed(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _grouped(pattern: str) -> re.Pattern[str]:
    """As `fnmatch`, but what each `*` matches is a group."""
    pieces = re.split(r"(\*|\?|\[!?\]?[^\]]*\])", pattern)
    words = {"*": "(.*)", "?": "."}
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            pieces[number] = re.escape(piece)
        elif piece in words:
            pieces[number] = words[piece]
        else:
            pieces[number] = translate(piece).split(":", 1)[1].rsplit(")", 1)[0]
    return re.compile("".join(pieces), re.DOTALL)
