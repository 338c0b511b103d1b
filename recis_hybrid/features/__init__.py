"""FeatureEngine: turns the raw columns of a batch into the ids, buckets and rows that a model takes."""

from __future__ import annotations

from recis_hybrid.features.engine import FeatureEngine as FeatureEngine
from recis_hybrid.features.feature import Feature as Feature
from recis_hybrid.features.op import Column as Column, Kernel as Kernel, Op as Op
from recis_hybrid.features.ops.ids import (
    DecimalString as DecimalString,
    Hash as Hash,
    Mod as Mod,
    MultiHash as MultiHash,
    StringMultiHash as StringMultiHash,
)
from recis_hybrid.features.ops.joins import Concat as Concat, Cross as Cross
from recis_hybrid.features.ops.numbers import (
    Bucketize as Bucketize,
    Cast as Cast,
    Clip as Clip,
    Log as Log,
    Normalize as Normalize,
)
from recis_hybrid.features.ops.resize import FillNull as FillNull, Pad as Pad, ToDense as ToDense, Truncate as Truncate
from recis_hybrid.features.ops.rows import (
    Distinct as Distinct,
    Length as Length,
    MultiHot as MultiHot,
    OneHot as OneHot,
    Tile as Tile,
    TopK as TopK,
)
from recis_hybrid.features.ops.times import Age as Age, DatePart as DatePart
from recis_hybrid.features.ops.tokenize import Tokenize as Tokenize
from recis_hybrid.features.ops.vocabulary import Mask as Mask, Vocabulary as Vocabulary
from recis_hybrid.features.program.plan import Plan as Plan
from recis_hybrid.features.registry import (
    make_op as make_op,
    register_op as register_op,
    registered_ops as registered_ops,
)
