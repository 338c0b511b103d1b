"""Embedding Engine: growing, collision-free tables behind named features."""

from recis_hybrid.embedding.blocks import EmbeddingBlocks as EmbeddingBlocks
from recis_hybrid.embedding.config import EmbeddingConfig as EmbeddingConfig
from recis_hybrid.embedding.engine import (
    EmbeddingEngine as EmbeddingEngine,
    EngineLookup as EngineLookup,
    dense_parameters as dense_parameters,
)
from recis_hybrid.embedding.hash_table import Anchor as Anchor, HashTable as HashTable, MemberTable as MemberTable
from recis_hybrid.embedding.id_map import IdMap as IdMap
from recis_hybrid.embedding.initializers import Constant as Constant, Normal as Normal, Uniform as Uniform
from recis_hybrid.embedding.lookup import FeatureIds as FeatureIds, Lookup as Lookup, RowGradients as RowGradients
from recis_hybrid.embedding.record_layout import RecordLayout as RecordLayout, StateField as StateField
