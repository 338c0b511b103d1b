"""Embedding Engine: growing, collision-free tables behind named features."""

from __future__ import annotations

from recis_hybrid.embedding.admission import (
    AdmitIf as AdmitIf,
    MinFrequency as MinFrequency,
    NewIds as NewIds,
    Probability as Probability,
)
from recis_hybrid.embedding.config import EmbeddingConfig as EmbeddingConfig
from recis_hybrid.embedding.ddp import leave_out_of_ddp as leave_out_of_ddp, mean_over_samples as mean_over_samples
from recis_hybrid.embedding.distributed.exchange import ExchangeError as ExchangeError, Traffic as Traffic
from recis_hybrid.embedding.engine import (
    EmbeddingEngine as EmbeddingEngine,
    EngineLookup as EngineLookup,
    dense_parameters as dense_parameters,
)
from recis_hybrid.embedding.eviction import (
    Capacity as Capacity,
    Eviction as Eviction,
    EvictionRule as EvictionRule,
    Rows as Rows,
    SmallNorm as SmallNorm,
    Unused as Unused,
    UnusedFor as UnusedFor,
)
from recis_hybrid.embedding.gate import Admission as Admission, Gate as Gate, TableShare as TableShare
from recis_hybrid.embedding.gradients import exchange_gradients as exchange_gradients
from recis_hybrid.embedding.initializers import (
    Constant as Constant,
    Initializer as Initializer,
    KaimingNormal as KaimingNormal,
    KaimingUniform as KaimingUniform,
    Normal as Normal,
    TruncatedNormal as TruncatedNormal,
    Uniform as Uniform,
    XavierNormal as XavierNormal,
    XavierUniform as XavierUniform,
)
from recis_hybrid.embedding.optimizer import (
    BeforeRead as BeforeRead,
    OptimizerSpec as OptimizerSpec,
    RowOptimizer as RowOptimizer,
)
from recis_hybrid.embedding.placement import Placement as Placement
from recis_hybrid.embedding.planner.estimate import (
    RankEstimate as RankEstimate,
    TableEstimate as TableEstimate,
    plan as plan,
)
from recis_hybrid.embedding.planner.sharding import sharding_of as sharding_of
from recis_hybrid.embedding.statistics import (
    MemberStatistics as MemberStatistics,
    TableStatistics as TableStatistics,
)
from recis_hybrid.embedding.sweeps import CompactionSweep as CompactionSweep, EvictionSweep as EvictionSweep
from recis_hybrid.embedding.table.blocks import EmbeddingBlocks as EmbeddingBlocks
from recis_hybrid.embedding.table.hash_table import Anchor as Anchor, HashTable as HashTable
from recis_hybrid.embedding.table.id_map import IdMap as IdMap
from recis_hybrid.embedding.table.lookup import FeatureIds as FeatureIds, Lookup as Lookup
from recis_hybrid.embedding.table.record_cache import CacheStatistics as CacheStatistics
from recis_hybrid.embedding.table.record_layout import (
    MemberTable as MemberTable,
    RecordLayout as RecordLayout,
    StateField as StateField,
)
from recis_hybrid.embedding.table.store import RowStore as RowStore
from recis_hybrid.embedding.table.tracking import HotId as HotId
