"""Checkpoints in safetensors and JSON: atomic, verified, never executed."""

from recis_hybrid.saver.errors import (
    CheckpointError as CheckpointError,
    CheckpointMismatch as CheckpointMismatch,
    CorruptCheckpoint as CorruptCheckpoint,
)
from recis_hybrid.saver.per_rank import PerRank as PerRank
from recis_hybrid.saver.protocol import (
    JSON as JSON,
    PartState as PartState,
    Saveable as Saveable,
    TableState as TableState,
)
from recis_hybrid.saver.saver import Saver as Saver
