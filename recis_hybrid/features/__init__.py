"""Feature Engine: raw columns of a batch to ids and buckets, Batch → Batch."""

from recis_hybrid.features.engine import FeatureEngine as FeatureEngine
from recis_hybrid.features.feature import Feature as Feature
from recis_hybrid.features.op import Column as Column, Kernel as Kernel, Op as Op
from recis_hybrid.features.operations import Bucketize as Bucketize, Hash as Hash, Mod as Mod
from recis_hybrid.features.plan import Plan as Plan
