"""Faults that users of other libraries reported, as tests of this one; each names its report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, IdMap, Uniform, Unused
from recis_hybrid.embedding.table.id_map import GROW_LOAD, MAX_LOAD
from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.saver import Saver
from recis_hybrid.serving import Reader
from tests.support.chunks import tiny_chunks
from tests.support.devices import on_devices
from tests.support.near import assert_near
from tests.support.table_model import TableModel
from tests.support.table_rules import EVICTIONS, RULES

MOST = torch.iinfo(torch.int64).max


@on_devices
@pytest.mark.parametrize("rule", ["RowwiseAdagrad", "Adam"])
def test_no_row_is_zero_after_eviction(device: str, rule: str) -> None:
    """TorchRec 3030: shared tables returned zeros once rows were evicted and their optimizer state was reset."""
    spec = RULES[rule].spec
    config = EmbeddingConfig(dim=8, initializer=Uniform(-1, 1))
    shared = EmbeddingConfig(dim=8, initializer=Uniform(-1, 1), table="item")
    engine = EmbeddingEngine({"item": config, "again": shared, "user": config}, optimizer=spec, seed=3, device=device)
    optimizer = engine.make_optimizer()
    models = {name: TableModel(name, 8, 3, torch.float32, RULES[rule], None, False) for name in ("item", "user")}
    for step in range(1, 7):
        # Each window brings new ids, which get the rows of evicted ones, and the first two come back.
        ids = [0, 1, *range(10 * step, 10 * step + 10)]
        batch = {name: torch.tensor(ids, device=device) for name in engine.configs}
        outputs = engine(batch)
        for name, table in (("item", "item"), ("again", "item"), ("user", "user")):
            expected = models[table].look_up(ids, step)
            assert outputs[name].detach().double().cpu().tolist() == expected.tolist()
            assert bool((outputs[name] != 0).any(1).all())
        sum(output.sum() for output in outputs.values()).backward()
        optimizer.step()
        for model in models.values():
            table, member = next((t, m) for t in engine.tables for m, x in enumerate(t.members) if x.name == model.name)
            twice = torch.full((8,), 2.0 if model.name == "item" else 1.0, dtype=torch.float64).numpy()
            columns = {name: values.cpu() for name, values in table.export(member).items()}
            model.update(dict.fromkeys(ids, twice), step, columns)
            if step % 2 == 0:
                model.evict(model.unwanted(EVICTIONS["unused for 1"], step))
        if step % 2 == 0:
            assert engine.evict(EVICTIONS["unused for 1"].rule) > 0


@on_devices
@pytest.mark.parametrize("rule", ["SGD", "RowwiseAdagrad", "Adam"])
@pytest.mark.parametrize("dim", [1025, 2049])
def test_wide_rows(device: str, rule: str, dim: int) -> None:
    """TorchRec 3673: vectors of more than 1,024 elements were read as zeros."""
    config = EmbeddingConfig(dim=dim, initializer=Uniform(-1, 1))
    engine = EmbeddingEngine({"id": config}, optimizer=RULES[rule].spec, device=device)
    optimizer = engine.make_optimizer()
    model = TableModel("id", dim, 0, torch.float32, RULES[rule], None, False)
    ids = [1, -7, 1, 2**40]
    for step in (1, 2):
        output = engine({"id": torch.tensor(ids, device=device)})["id"]
        assert torch.equal(output.detach().double().cpu(), torch.from_numpy(model.look_up(ids, step)))
        gradient = torch.randn(len(ids), dim)
        output.backward(gradient.to(device))
        optimizer.step()
        sums = {i: gradient[[k for k, j in enumerate(ids) if i == j]].sum(0).double().numpy() for i in ids}
        model.update(sums, step, {name: values.cpu() for name, values in engine.tables[0].export(0).items()})


@on_devices
def test_ids_that_differ_in_their_upper_bits_only(device: str, tmp_path: Path) -> None:
    """FBGEMM 5876: ids were cut to 32 bits."""
    low = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    ids = (low[:, None] + (torch.arange(-8, 8) << 32)).view(-1)
    ids = torch.cat([ids, low + (1 << 53), low + (1 << 62)])
    assert len(ids.unique()) == len(ids)
    assert len((ids & 0xFFFFFFFF).unique()) == len(low)
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, initializer=Uniform(-1, 1))}, device=device)
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    batch = {"id": ids.to(device)}
    first = engine(batch)["id"]
    assert len(first.unique(dim=0)) == len(ids)
    change = torch.randn(len(ids), 2).to(device)
    expected = first.detach() - change
    first.backward(change)
    optimizer.step()
    assert torch.equal(engine.eval()(batch)["id"], expected)
    Saver(tmp_path).save(1, {"engine": engine})
    again = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, device=device)
    Saver(tmp_path).load({"engine": again})
    assert torch.equal(again.eval()(batch)["id"], expected)
    assert torch.equal(torch.from_numpy(Reader(tmp_path).lookup("id", ids.numpy())), expected.cpu())
    assert again.tables[0].erase(0, ids[::2].to(device)) == len(ids[::2])
    assert again.tables[0].ids(0).tolist() == ids[1::2].sort().values.tolist()


@on_devices
def test_a_row_is_not_written_for_an_evicted_id(device: str) -> None:
    """FBGEMM 5954: gradients reached rows that had been evicted meanwhile, and given to other ids."""
    config = EmbeddingConfig(dim=4, initializer=Uniform(-1, 1))
    engine = EmbeddingEngine({"id": config}, optimizer=optim.Adam, device=device)
    optimizer, table = engine.make_optimizer(lr=0.1), engine.tables[0]
    old, new = ({"id": torch.tensor(ids, device=device)} for ids in ([1, 2, 3], [7, 8, 9]))
    _, lookup = engine.lookup(old)
    output = engine(old)["id"]
    rows = table.rows(0, old["id"])
    table.step += 5  # as if others had been trained
    assert engine.evict(Unused(1)) == 3
    engine(new)
    assert set(table.rows(0, new["id"]).tolist()) == set(rows.tolist())
    before = table.export(0)
    with pytest.raises(RuntimeError, match="rows were cleared, erased or moved since"):
        engine.apply_gradients(lookup, {"id": torch.ones(3, 4, device=device)}, optimizer)
    with pytest.raises(RuntimeError, match="rows were cleared, erased or moved since"):
        output.sum().backward()
    optimizer.step()
    after = table.export(0)
    assert after["ids"].tolist() == [7, 8, 9]
    assert all(torch.equal(values, after[name]) for name, values in before.items())


@on_devices
@pytest.mark.parametrize("in_place", [False, True])
def test_no_id_is_lost_at_high_load(device: str, in_place: bool) -> None:
    """HierarchicalKV 49 and 242: keys that had been inserted were not found in a full table."""
    generator = torch.Generator().manual_seed(7)
    live: dict[int, int] = {}
    loads = []
    with tiny_chunks(8, 4) if in_place else tiny_chunks(1 << 15):
        ids = IdMap(torch.device(device), capacity=1024)
        for _ in range(20 if device == "cpu" else 8):
            batch = torch.randint(-MOST, MOST, (97,), generator=generator).to(device)
            ids.reserve(batch.numel())
            rows, _ = ids.find_or_insert([batch], [0])
            ids.commit()
            live |= dict(zip(batch.tolist(), rows.tolist(), strict=True))
            loads.append(ids.load)
            known = torch.tensor(list(live), device=device)
            assert ids.find([known], [0]).tolist() == list(live.values())
            assert len(set(live.values())) == len(live) == len(ids)
            for gone in list(live)[: 60 if len(live) > 600 else 0]:
                del live[gone]
                ids.erase_slots(ids.slots_of([torch.tensor([gone], device=device)], [0]))
    assert max(loads) > (GROW_LOAD if in_place else MAX_LOAD) - 0.1


@on_devices
@pytest.mark.parametrize("rule", ["SGD", "Adagrad"])
def test_duplicates_in_a_batch_are_one_update(device: str, rule: str) -> None:
    """TorchRec 1298: batches with many duplicates trained otherwise than nn.EmbeddingBag."""
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=8)}, optimizer=getattr(optim, rule), device=device)
    optimizer = engine.make_optimizer(lr=0.1)
    known = torch.arange(6, device=device)
    engine.tables[0].insert(0, known)
    bags = nn.EmbeddingBag(6, 8, mode="sum")
    with torch.no_grad():
        bags.weight.copy_(engine.eval()({"id": known})["id"].cpu())
    reference = getattr(torch.optim, rule)(bags.parameters(), lr=0.1)
    lengths = torch.arange(40) % 7
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    engine.train()
    for _ in range(3):
        ids = (torch.rand(int(offsets[-1])) ** 4 * 6).long()  # a half are id 0
        gradient = torch.randn(len(lengths), 8)
        output = engine({"id": RaggedTensor(ids, offsets).to(device)})["id"]
        output.backward(gradient.to(device))
        optimizer.step()
        expected = bags(ids, offsets[:-1])
        assert_near(output, expected.detach())
        reference.zero_grad()
        expected.backward(gradient)
        reference.step()
    assert_near(engine.tables[0].export(0)["embedding"], bags.weight.detach())
    assert len(engine.tables[0]) == 6
