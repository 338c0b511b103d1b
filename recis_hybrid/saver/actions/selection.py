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
    """Result of a partial load. Entries are ``part: name``, with live names except in ``unused``."""

    step: int | None
    """Step of the checkpoint; None for files that are not a checkpoint."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Selected names of the live objects that the checkpoint lacks; left unchanged."""

    unused: list[str] = field(default_factory=list)
    """Selected names of the checkpoint that the live objects lack."""

    unfit: list[str] = field(default_factory=list)
    """Present in both, but shapes, dtypes or columns differ, as described; left unchanged."""

    def refuse(self, where: str) -> None:
        """Raise if a selected name has no counterpart, or one that does not fit.

        Args:
            where: Source of the load, for the message.

        Raises:
            CheckpointMismatch: There are such names; the first four of each kind are listed.
        """
        found = [
            *_first_few(self.unfit),
            *_first_few(self.unused, "in the checkpoint only"),
            *_first_few(self.missing, "in the live object only"),
        ]
        if found:
            raise CheckpointMismatch(
                f"{where} does not fit the live objects: {'; '.join(found)}. Nothing was loaded. Narrow "
                "the selection with `only` or `exclude`, map names with `rename`, or load what fits with strict=False."
            )


class Selection:
    """Patterns over names: ``*``, ``?`` and ``[...]`` as in file names.

    Args:
        only: Patterns of the names to load; None for all.
        exclude: Patterns of names to skip.
        rename: Maps names in the checkpoint to names in the live object: ``{"encoder.*": "tower.*"}``. The first
            pattern that matches applies. Each ``*`` on the right stands for the text that the corresponding ``*`` on
            the left matched.

    Raises:
        CheckpointError: An argument has values that are not strings, ``only`` is empty, or a name on the right has more
            ``*`` than the pattern on its left.
    """

    def __init__(
        self, only: str | Sequence[str] | None, exclude: str | Sequence[str], rename: Mapping[str, str] | None
    ) -> None:
        self._only = None if only is None else _listed("only", only)
        self._exclude = _listed("exclude", exclude)
        if self._only == []:
            raise CheckpointError("only: must have at least one pattern, got none. Omit it to load everything.")
        if rename is not None and not (
            isinstance(rename, Mapping) and all(isinstance(text, str) for pair in rename.items() for text in pair)
        ):
            raise CheckpointError(f"rename: must map names to names, such as {{'old.*': 'new.*'}}, got {rename!r}.")
        self._renamed = dict(rename or {})
        self._rename: list[tuple[re.Pattern[str], list[str]]] = []
        for pattern, name in self._renamed.items():
            pieces = name.split("*")
            if pattern.count("*") < len(pieces) - 1:
                raise CheckpointError(
                    f"rename: {name!r} must have at most as many '*' as {pattern!r}. Write the name out."
                )
            self._rename.append((_grouped(pattern), pieces))

    def takes(self, name: str) -> bool:
        """Return whether a name is selected."""
        chosen = self._only is None or any(fnmatchcase(name, pattern) for pattern in self._only)
        return chosen and not any(fnmatchcase(name, pattern) for pattern in self._exclude)

    def live_name(self, name: str) -> str:
        """Return the live object's name for a name in the checkpoint."""
        for pattern, pieces in self._rename:
            match = pattern.fullmatch(name)
            if match is not None:
                return pieces[0] + "".join(a + b for a, b in zip(match.groups(), pieces[1:], strict=False))
        return name

    def live_names(self, names: Iterable[str]) -> dict[str, str]:
        """Map the selected names of a checkpoint to the live object.

        A name is selected by its name in the checkpoint or by its name in the live object.

        Args:
            names: All names in the checkpoint.

        Returns:
            Names in the checkpoint, by name in the live object.

        Raises:
            CheckpointError: Two names have the same name in the live object.
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
            where: Source of the load, for the message.
            saved: All names in the checkpoint, of all parts to load.
            live: All names in the live objects.

        Raises:
            CheckpointError: A pattern of ``only`` or ``exclude`` matches no name in the checkpoint or in the live
                objects, one of ``rename`` applies to no name in the checkpoint, or all names are excluded.
        """
        saved_names, live_names = list(dict.fromkeys(saved)), list(dict.fromkeys(live))
        known = list(dict.fromkeys([*saved_names, *(self.live_name(name) for name in saved_names), *live_names]))
        for argument, patterns in (("only", self._only or []), ("exclude", self._exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in known):
                    raise CheckpointError(
                        f"{where}: {argument}={pattern!r} matches no name in the checkpoint or in the live objects"
                        f"{_near(pattern, known)}. Nothing was loaded."
                    )
        unmatched = set(saved_names)
        for pattern, (compiled, _) in zip(self._renamed, self._rename, strict=True):
            matched = {name for name in saved_names if compiled.fullmatch(name)}
            if not matched:
                raise CheckpointError(
                    f"{where}: rename={pattern!r} matches no name in the checkpoint"
                    f"{_near(pattern, saved_names)}. Nothing was loaded."
                )
            if not matched & unmatched:
                raise CheckpointError(
                    f"{where}: rename={pattern!r} renames nothing, because earlier patterns match the same names and "
                    "the first match applies. Move it before them, or remove it. Nothing was loaded."
                )
            unmatched -= matched
        if (
            known
            and not any(self._chosen(name, self.live_name(name)) for name in saved_names)
            and not any(self.takes(name) for name in live_names)
        ):
            raise CheckpointError(
                f"{where}: only={self._only} and exclude={self._exclude} select none of {len(known)} names"
                f": {_shown(known)}. Nothing was loaded."
            )

    def _chosen(self, name: str, live: str) -> bool:
        wanted = self._only is None or any(fnmatchcase(n, p) for n in (name, live) for p in self._only)
        return wanted and not any(fnmatchcase(n, p) for n in (name, live) for p in self._exclude)


def _first_few(names: list[str], where: str = "") -> list[str]:
    shown = [f"{name} is {where}" if where else name for name in names[:_MOST]]
    return shown + ([f"and {len(names) - _MOST} more like these"] if len(names) > _MOST else [])


def _listed(argument: str, patterns: str | Iterable[str]) -> list[str]:
    listed = [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, Iterable) else None
    if listed is None or not all(isinstance(pattern, str) for pattern in listed):
        raise CheckpointError(
            f"{argument}: must be a pattern or a list of patterns, such as ['user', 'tower.*'], got {patterns!r}."
        )
    return listed


def _near(pattern: str, names: Sequence[str]) -> str:
    """Return similar names as the end of a sentence; prefixes of a name up to a dot count, too."""
    wanted = pattern.lower().rstrip("*.")
    prefixes: dict[str, list[str]] = {}
    for name in names:
        for end in [*(match.start() for match in re.finditer(r"\.", name)), len(name)]:
            prefixes.setdefault(name[:end].lower(), []).append(name)
    close = difflib.get_close_matches(wanted, prefixes, n=_MOST)
    near = list(dict.fromkeys(name for prefix in close for name in prefixes[prefix]))
    if near:
        return f"; similar names: {_shown(near)}"
    return f"; there are {_shown(names)}" if names else "; there are none"


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(repr(name) for name in names[:_MOST]) + more


def _grouped(pattern: str) -> re.Pattern[str]:
    """Compile a pattern of ``fnmatch``, with a group for each ``*``."""
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
