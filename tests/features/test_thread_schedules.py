"""Features under many schedules of threads, on the emulated device: bitwise those of the CPU."""

from __future__ import annotations

import torch

from recis_hybrid.features import (
    Bucketize,
    Concat,
    Cross,
    DecimalString,
    Distinct,
    Feature,
    FeatureEngine,
    FillNull,
    Hash,
    Length,
    Mask,
    Mod,
    MultiHash,
    MultiHot,
    Pad,
    Tile,
    TopK,
    Truncate,
    Vocabulary,
)
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support.features import assert_same, moved_to, without_unused_values
from tests.support.schedules import Schedule, on_schedules

FEATURES = [
    Feature("hashed", ops=[Hash("xxh64"), MultiHash([10, 20])], source="id"),
    Feature("known", ops=[Vocabulary([1, 2, 3, -7], unknown=9)], source="small"),
    Feature("bucket", ops=[FillNull(0.5), Bucketize([-1.5, 0, 2.25])], source="price"),
    Feature("name", ops=[Hash(), Mod(1000)]),
    Feature("first", ops=[Truncate(3), Hash("murmur"), Mod(100)], source="clicks"),
    Feature("last", ops=[Truncate(2, "left"), Pad(4, -1)], source="clicks"),
    Feature("best", ops=[TopK(3)], source="clicks"),
    Feature("distinct", ops=[Mod(5), Distinct()], source="clicks"),
    Feature("filled", ops=[FillNull(3), Length()], source="clicks"),
    Feature("hot", ops=[Mod(6), MultiHot(6)], source="clicks"),
    Feature("marked", ops=[Mask([2, 0])], source="small_rows"),
    Feature("digits", ops=[DecimalString(), Hash()], source="clicks"),
    Feature("tiled", ops=[Mod(9), Tile(2)], source="clicks"),
    Feature("pair", ops=[Cross()], source=["id", "clicks"]),
    Feature("all", ops=[Hash(), Concat(), Mod(1000)], source=["id", "clicks", "small"]),
]


def batch_of(generator: torch.Generator) -> Batch:
    rows = int(torch.randint(1, 300, (1,), generator=generator))
    lengths = torch.randint(0, 6, (rows,), generator=generator)
    lengths[torch.rand(rows, generator=generator) < 0.2] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    count = int(offsets[-1])
    price = torch.randn(rows, generator=generator)
    price[torch.rand(rows, generator=generator) < 0.1] = torch.nan
    return {
        "id": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        "small": torch.randint(-8, 5, (rows,), generator=generator),
        "price": price,
        "clicks": RaggedTensor(
            torch.randint(-50, 50, (count,), generator=generator), offsets, torch.rand(count, generator=generator)
        ),
        "small_rows": RaggedTensor(torch.randint(0, 3, (count,), generator=generator), offsets),
        "name": RaggedTensor.from_strings(
            [f"name {n}"[: n % 9] for n in torch.randint(0, 99, (rows,), generator=generator).tolist()]
        ),
    }


@on_schedules(25)
def test_features_are_those_of_the_cpu(schedule: Schedule) -> None:
    with schedule.running() as generator:
        engine = FeatureEngine(FEATURES)
        for _ in range(2):  # the second run finds its programs on the device
            batch = batch_of(generator)
            assert_same(without_unused_values(engine(moved_to(batch, "emulated"))), FeatureEngine(FEATURES)(batch))
        engine.check()
