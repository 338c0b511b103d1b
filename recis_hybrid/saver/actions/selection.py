"""Selection of the names to load, and their names in the live object."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase, translate

from recis_hybrid.saver.errors import CheckpointError, CheckpointMismatch

_MOST = 4


@dataclass(frozen=True)
class Loaded:
    """Result of a partial load, as ``part: name``, by the names of the live objects except for ``unused``."""

    step: int | None
    """Step of the checkpoint; None for files that are not a checkpoint."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Selected names of the live objects that the checkpoint lacks; left unchanged."""

    unused: list[str] = field(default_factory=list)
    """In the checkpoint, selected, but without a place in the live objects."""

    unfit: list[str] = field(default_factory=list)
    """In both, but of another form, which is said: they stayed as they were."""

    def refuse(self, where: str) -> None:
        """Raise if something was selected and has no counterpart, or another form.

        Args:
            where: What is loaded, for the message.

        Raises:
            CheckpointMismatch: There is; the first four of each kind are listed.
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
    """Patterns over names: ``*``, ``?`` and ``[...]`` as in file names.

    Args:
        only: Patterns of the names to take; None for all.
        exclude: Patterns of names to leave out.
        rename: Names that the checkpoint has, and those of the live object: ``{"encoder.*": "tower.*"}``. The first
            pattern that matches counts; each ``*`` on the right takes what the ``*`` on the left of the same place
            matched.

    Raises:
        CheckpointError: An argument is not made of strings, ``only`` is empty, or a name on the right has more ``*``
            than the pattern on its left.
    """

    def __init__(
        self, only: str | Sequence[str] | None, exclude: str | Sequence[str], rename: Mapping[str, str] | None
    ) -> None:
        self._only = None if only is None else _listed("only", only)
        self._exclude = _listed("exclude", exclude)
        if self._only == []:
            raise CheckpointError("only: must have at least one pattern, got none. Leave it out to load everything.")
        if rename is not None and not (
            isinstance(rename, Mapping) and all(isinstance(text, str) for pair in rename.items() for text in pair)
        ):
            raise CheckpointError(f"rename: must map names to names, as {{'old.*': 'new.*'}}, got {rename!r}.")
        self._renamed = dict(rename or {})
        self._rename: list[tuple[re.Pattern[str], list[str]]] = []
        for pattern, name in self._renamed.items():
            pieces = name.split("*")
            if pattern.count("*") < len(pieces) - 1:
                raise CheckpointError(f"rename: {name!r} must have at most as many '*' as {pattern!r}. Write it out.")
            self._rename.append((_grouped(pattern), pieces))

    def takes(self, name: str) -> bool:
        """Return whether a name is selected."""
        chosen = self._only is None or any(fnmatchcase(name, pattern) for pattern in self._only)
        return chosen and not any(fnmatchcase(name, pattern) for pattern in self._exclude)

    def live_name(self, name: str) -> str:
        """Return the name that the live object has for what the checkpoint calls ``name``."""
        for pattern, pieces in self._rename:
            match = pattern.fullmatch(name)
            if match is not None:
                return pieces[0] + "".join(a + b for a, b in zip(match.groups(), pieces[1:], strict=False))
        return name

    def live_names(self, names: Iterable[str]) -> dict[str, str]:
        """Map selected names of a checkpoint.

        A name is selected by what the checkpoint calls it, or by what the live object does.

        Args:
            names: All of the checkpoint.

        Returns:
            Names of the checkpoint by names of the live object.

        Raises:
            CheckpointError: Two get the same name.
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

    def refuse_unmatched(self, where: str, saved: Iterable[str], live: Iterable[str]) -> None:
        """Raise if a pattern matches no name, or no name is selected.

        Args:
            where: What is loaded, for the message.
            saved: All names in the checkpoint, over all parts that are loaded.
            live: All names in the live objects.

        Raises:
            CheckpointError: A pattern of ``only`` or ``exclude`` matches neither a name in the checkpoint nor one in
                the live objects, one of ``rename`` applies to no name in the checkpoint, or all names are excluded.
        """
        there, here = list(dict.fromkeys(saved)), list(dict.fromkeys(live))
        known = list(dict.fromkeys([*there, *(self.live_name(name) for name in there), *here]))
        for argument, patterns in (("only", self._only or []), ("exclude", self._exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in known):
                    raise CheckpointError(
                        f"{where}: {argument}={pattern!r} matches no name in the checkpoint or in the live objects"
                        f"{_near(pattern, known)}. Nothing was loaded."
                    )
        left = set(there)
        for pattern, (compiled, _) in zip(self._renamed, self._rename, strict=True):
            matched = {name for name in there if compiled.fullmatch(name)}
            if not matched:
                raise CheckpointError(
                    f"{where}: rename={pattern!r} matches no name in the checkpoint{_near(pattern, there)}. Nothing "
                    "was loaded."
                )
            if not matched & left:
                raise CheckpointError(
                    f"{where}: rename={pattern!r} renames nothing, since patterns before it match the same names: the "
                    "first that matches counts. Put it before them, or leave it out. Nothing was loaded."
                )
            left -= matched
        if (
            known
            and not any(self._chosen(name, self.live_name(name)) for name in there)
            and not any(self.takes(name) for name in here)
        ):
            raise CheckpointError(
                f"{where}: only={self._only} and exclude={self._exclude} select none of {len(known)} names"
                f": {_shown(known)}. Nothing was loaded."
            )

    def _chosen(self, name: str, live: str) -> bool:
        wanted = self._only is None or any(fnmatchcase(n, p) for n in (name, live) for p in self._only)
        return wanted and not any(fnmatchcase(n, p) for n in (name, live) for p in self._exclude)


def _some(names: list[str], where: str = "") -> list[str]:
    shown = [f"{name} is {where}" if where else name for name in names[:_MOST]]
    return shown + ([f"and {len(names) - _MOST} more like these"] if len(names) > _MOST else [])


def _listed(argument: str, patterns: str | Iterable[str]) -> list[str]:
    listed = [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, Iterable) else None
    if listed is None or not all(isinstance(pattern, str) for pattern in listed):
        raise CheckpointError(
            f"{argument}: must be a pattern or a list of patterns, as ['user', 'tower.*'], got {patterns!r}."
        )
    return listed


def _near(pattern: str, names: Sequence[str]) -> str:
    """Return near names as the end of a sentence; prefixes of a name up to a dot count too."""
    wanted = pattern.lower().rstrip("*.")
    beginnings: dict[str, list[str]] = {}
    for name in names:
        for end in [*(match.start() for match in re.finditer(r"\.", name)), len(name)]:
            beginnings.setdefault(name[:end].lower(), []).append(name)
    close = difflib.get_close_matches(wanted, beginnings, n=_MOST)
    near = list(dict.fromkeys(name for beginning in close for name in beginnings[beginning]))
    if near:
        return f"; similar names: {_shown(near)}"
    return f"; there are {_shown(names)}" if names else "; there are none"


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(repr(name) for name in names[:_MOST]) + more


def _grouped(pattern: str) -> re.Pattern[str]:
    """As ``fnmatch``, but what each ``*`` matches is a group."""
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
