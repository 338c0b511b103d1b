"""Parts that are not the same on every rank."""

from __future__ import annotations

import warnings

from recis_hybrid.saver.errors import CheckpointMismatch
from recis_hybrid.saver.format.manifest import Manifest


class PerRank:
    """Marks a part of which every rank saves its own, such as a generator that is seeded by rank.

    It is saved as one part for each rank, named ``name[rank]``. On another world size each rank loads that of its
    number; a rank that had none keeps what it has, with a warning.

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
    """Find the part of a checkpoint that a rank loads.

    Args:
        name: As the user passed it.
        part: What the user passed, perhaps a ``PerRank``.
        manifest: Of the checkpoint.
        rank: The rank.

    Returns:
        Its name in the checkpoint; None if there is none for this rank, of which a warning tells.

    Raises:
        CheckpointMismatch: It was saved of each rank, and is to be loaded as one of all.
    """
    own = f"{name}[{rank}]"
    if not isinstance(part, PerRank):
        if name not in manifest.parts and f"{name}[0]" in manifest.parts:
            raise CheckpointMismatch(
                f"Saver.load: part {name!r} was saved of each rank, {name + '[0]'!r} and so on. Pass it in a "
                "PerRank, or load one of them by its name."
            )
        return name
    if own in manifest.parts or f"{name}[0]" not in manifest.parts:
        return own if own in manifest.parts else name
    warnings.warn(
        f"Saver.load: part {name!r} was saved by {manifest.world_size} ranks and is left as it is on rank {rank}.",
        stacklevel=5,
    )
    return None
