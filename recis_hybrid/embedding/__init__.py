"""Embedding Engine: growing, collision-free tables behind named features."""

from recis_hybrid.embedding.blocks import EmbeddingBlocks as EmbeddingBlocks
from recis_hybrid.embedding.config import EmbeddingConfig as EmbeddingConfig
from recis_hybrid.embedding.engine import EmbeddingEngine as EmbeddingEngine
from recis_hybrid.embedding.engine import EngineLookup as EngineLookup
from recis_hybrid.embedding.engine import dense_parameters as dense_parameters
from recis_hybrid.embedding.hash_table import Anchor as Anchor
from recis_hybrid.embedding.hash_table import HashTable as HashTable
from recis_hybrid.embedding.hash_table import MemberTable as MemberTable
from recis_hybrid.embedding.id_map import IdMap as IdMap
from recis_hybrid.embedding.initializers import Constant as Constant
from recis_hybrid.embedding.initializers import Normal as Normal
from recis_hybrid.embedding.initializers import Uniform as Uniform
from recis_hybrid.embedding.lookup import FeatureIds as FeatureIds
from recis_hybrid.embedding.lookup import Lookup as Lookup
from recis_hybrid.embedding.lookup import RowGradients as RowGradients
from recis_hybrid.embedding.record_layout import RecordLayout as RecordLayout
from recis_hybrid.embedding.record_layout import StateField as StateField
