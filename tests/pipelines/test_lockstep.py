"""Empty batches for ranks that have run out of data, with columns of all types."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from recis_hybrid.pipelines.lockstep import _rows, digest_of, in_lockstep, without_rows
from recis_hybrid.ragged import RaggedTensor


class Pair(NamedTuple):
    inputs: Any
    labels: Any


def test_an_empty_batch_has_the_same_columns() -> None:
    lists = RaggedTensor.from_lists([[[1], [2, 3]], [[4]]])
    batch = {
        "id": torch.tensor([1, 2]),
        "matrix": torch.zeros(2, 3),
        "lists": lists,
        "text": ["a", "b"],
        "array": np.arange(2.0),
        "nested": (torch.zeros(2, 1), [torch.ones(2)]),
        "epoch": 3,
        "scalar": torch.tensor(1.0),
    }
    empty = without_rows(batch)
    assert _rows(batch) == 2
    assert list(empty) == list(batch)
    assert (empty["id"].shape, empty["id"].dtype, empty["matrix"].shape) == ((0,), torch.int64, (0, 3))
    assert (empty["lists"].batch_size, empty["lists"].levels) == (0, lists.levels)
    assert (empty["text"], empty["array"].shape, empty["epoch"], float(empty["scalar"])) == ([], (0,), 3, 1.0)
    assert [empty["nested"][0].shape, empty["nested"][1][0].shape] == [(0, 1), (0,)]
    assert _rows({name: empty[name] for name in ("id", "matrix", "lists", "text", "array", "nested")}) == 0
    # It does not keep the memory of the batch alive.
    assert empty["id"].untyped_storage().nbytes() == empty["array"].nbytes == 0
    assert empty["array"].base is None


def test_equal_batches_have_equal_digests() -> None:
    lists = RaggedTensor.from_lists([[1], [2, 3]])
    batch = {"id": torch.tensor([1, 2]), "lists": lists, "text": ["a", "b"]}
    other = {**batch, "id": torch.tensor([1, 3])}
    assert digest_of(batch) == digest_of(dict(batch)) > 0
    assert digest_of(batch) != digest_of(other)
    assert digest_of({**batch, "lists": RaggedTensor.from_lists([[1, 2], [3]])}) != digest_of(batch)


def test_an_empty_batch_of_a_named_tuple() -> None:
    pair = Pair(torch.zeros(4, 2), torch.ones(4))
    empty = without_rows(pair)
    assert isinstance(empty, Pair)
    assert (_rows(pair), empty.inputs.shape, empty.labels.shape) == (4, (0, 2), (0,))


def test_one_process_reads_its_data_unchanged() -> None:
    batches = [{"id": torch.tensor([number])} for number in range(3)]
    state = torch.get_rng_state()
    assert list(in_lockstep(batches)) == batches
    assert list(in_lockstep([])) == []
    assert torch.equal(torch.get_rng_state(), state)
