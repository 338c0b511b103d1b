"""Parts that differ between ranks."""

from __future__ import annotations

import warnings

from recis_hybrid.saver.errors import CheckpointMismatch
from recis_hybrid.saver.format.manifest import Manifest


class PerRank:
    """Marks a part of which every rank saves its own state, such as a generator that is seeded by rank.

    It is saved as one part per rank, named ``name[rank]``. With another world size, each rank loads the part of its
    number. A rank without one leaves the object unchanged, with a warning.

    Args:
        value: The part.

    Example:
        >>> import tempfile, torch
        >>> from recis_hybrid.saver import Saver
        >>> generator = torch.Generator().manual_seed(3)
        >>> directory = Saver(tempfile.mkdtemp()).save(1, {"generator": PerRank(generator)})
    """

    def __init__(self, value: object) -> None:
        self.value = value


def name_of_rank(name: str, part: object, manifest: Manifest, rank: int) -> str | None:
    """Return the name of the saved part that a rank loads.

    Args:
        name: Name that the user passed.
        part: Object that the user passed, possibly a ``PerRank``.
        manifest: Manifest of the checkpoint.
        rank: The rank.

    Returns:
        The name in the checkpoint; None, with a warning, if it has none for this rank.

    Raises:
        CheckpointMismatch: The part was saved per rank, and is loaded without ``PerRank``.
    """
    own = f"{name}[{rank}]"
    if not isinstance(part, PerRank):
        if name not in manifest.parts and f"{name}[0]" in manifest.parts:
            raise CheckpointMismatch(
                f"Saver.load: part {name!r} was saved per rank, as {name + '[0]'!r} and so on. Wrap it in "
                "PerRank, or load one of them by its name."
            )
        return name
    if own in manifest.parts or f"{name}[0]" not in manifest.parts:
        return own if own in manifest.parts else name
    warnings.warn(
        f"Saver.load: part {name!r} was saved by {manifest.world_size} ranks and stays unchanged on rank {rank}.",
        stacklevel=5,
    )
    return None
