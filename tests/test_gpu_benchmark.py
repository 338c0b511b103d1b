"""``benchmarks/gpu.py`` runs on the emulated device and the CPU; its lines and verdicts. Times are not tested."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_steps
from benchmarks.gpu_workload import TINY, Bench, Measured, scattered, zipf
from tests.support.devices import on_accelerators

KEYS = [
    *("bench", "case", "metric", "unit", "ours", "peer", "peer_name", "ratio"),
    *("must", "aim", "verdict", "device", "detail"),
]

REASONS = {
    ("emulated", "hybrid/"): "DLPack does not know",
    ("cuda", "hybrid/"): "jax",
    ("cuda", "launches/"): "CUPTI",
}
"""Reasons for which a case may have no figure, by device and group."""


def check_lines(run: gpu.Run, group: str, capsys: pytest.CaptureFixture[str]) -> list[gpu.Line]:
    """Measure a group in this process, print its lines, and check their form."""
    lines = [run.line(measured, run.kind) for measured in run.measure(group)]
    assert sorted(line.case for line in lines) == sorted(case for case in gpu.TARGETS if case.startswith(group))
    for line in lines:
        line.print()
    printed = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [list(line) for line in printed] == [KEYS] * len(lines)
    return lines


@on_accelerators
@pytest.mark.parametrize("group", gpu.GROUPS)
def test_every_case_runs_on_accelerators(group: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    for line in check_lines(gpu.Run(device, tiny=True), group, capsys):
        if line.ours is None:
            assert REASONS[device, group] in line.detail
            assert line.verdict == "not run"
        else:
            assert math.isfinite(line.ours)
            assert line.ours > 0
            assert line.detail
            assert line.verdict == "not judged"


@pytest.mark.jax
def test_a_step_with_a_tower_in_jax_runs_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    for line in check_lines(gpu.Run("cpu", tiny=True), "hybrid/", capsys):
        assert line.verdict == "not judged"
        assert line.ours is not None
        assert line.ours > 0


@pytest.mark.parametrize(
    ("case", "value", "verdict", "ratio"),
    [
        ("find/0.5/uniform", 4.0, "aim", 1.03),
        ("find/0.5/uniform", 3.9, "must", 1.0),
        ("find/0.5/uniform", 2.0, "must", 0.513),
        ("find/0.5/uniform", 1.95, "missed", 0.5),
        ("step/uniform", 0.9, "aim", 1.5),
        ("step/uniform", 1.3, "must", 1.04),
        ("step/uniform", 2.7, "missed", 0.5),
        ("launches/100 features", 12, "aim", None),
        ("launches/100 features", 18, "must", None),
    ],
)
def test_verdicts(case: str, value: float, verdict: str, ratio: float | None) -> None:
    line = gpu.Run("cuda", tiny=False).line(Measured(case, value, ""), "NVIDIA Something")
    assert (line.verdict, line.ratio) == (verdict, ratio)
    assert gpu.Run("cuda", tiny=True).line(Measured(case, value, ""), "NVIDIA Something").verdict == "not judged"


def test_every_group_has_targets_and_every_target_a_group() -> None:
    for case, target in gpu.TARGETS.items():
        assert sum(case.startswith(group) for group in gpu.GROUPS) == 1, case
        assert target.verdict(target.aim) == "aim"
        assert target.verdict(target.must) == "must"
    assert all(any(case.startswith(group) for case in gpu.TARGETS) for group in gpu.GROUPS)


def test_kernels_are_counted_by_their_names() -> None:
    names = [
        "void recis::for_each_kernel<recis::GatherBags<float, 4> >(recis::GatherBags<float, 4>, long, int)",
        "void recis::(anonymous namespace)::for_each_counted_kernel<recis::(anonymous namespace)::Sum>(long)",
        "void cub::CUB_300001_SM_900::DeviceRadixSortOnesweepKernel<recis::Rows, int>(int*)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float> >(int)",
        "Memcpy DtoH (Device -> Pinned)",
        "Memset (Device)",
    ]
    measured = gpu_steps.counted_by_name("launches/100 features", names)
    assert measured.value == 2
    assert measured.detail == "1 CUB, 2 copies and memsets, 1 others"


def test_a_profile_without_kernels_is_no_count_of_zero() -> None:
    measured = gpu_steps.counted_by_name("launches/100 features", [])
    assert measured.value is None
    assert "CUPTI" in measured.detail


class _Ends(gpu.Run):
    """A run whose process ends after the first figure of a group, as after a fault of the GPU."""

    def measure(self, group: str) -> Iterator[Measured]:
        yield Measured("step/zipf", 1.0, "1,000 rows")
        os._exit(3)


class _Raises(gpu.Run):
    def measure(self, group: str) -> Iterator[Measured]:
        yield Measured("step/zipf", 1.0, "1,000 rows")
        raise RuntimeError("CUDA: out of memory\nand more")


def test_figures_before_the_end_of_a_process_are_kept() -> None:
    lines = list(_Ends("cuda", tiny=False).lines("step/", "NVIDIA Something", seconds=300))
    assert [(line.case, line.verdict) for line in lines] == [
        ("step/zipf", "must"),
        ("step/uniform", "failed"),
        ("step/one id at 1 %", "failed"),
    ]
    assert lines[1].detail == "the process ended with status 3"


def test_errors_are_reasons() -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    gpu._measure(sender, _Raises("cuda", tiny=False, threads=torch.get_num_threads()), "step/")
    assert receiver.recv() == Measured("step/zipf", 1.0, "1,000 rows")
    assert receiver.recv() == "RuntimeError: CUDA: out of memory"


def test_a_group_that_hangs_is_ended() -> None:
    lines = list(gpu.Run("cpu", tiny=True).lines("host/", "cpu", seconds=0))
    assert [(line.case, line.verdict, line.detail) for line in lines] == [("host/zipf", "failed", "not done after 0 s")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 0
    printed = capsys.readouterr()
    lines = [json.loads(text) for text in printed.out.splitlines()]
    assert [line["case"] for line in lines] == list(gpu.TARGETS)
    assert {(line["ours"], line["verdict"]) for line in lines} == {(None, "not yet run")}
    assert gpu.markdown([]) in printed.err


def test_the_targets_are_listed_beside_the_results(root: Path) -> None:
    text = (root / "benchmarks" / "GPU.md").read_text()
    for row in gpu.markdown([]).splitlines()[2:]:
        target = row.partition(" |  | not yet run")[0]
        assert target in text, f"benchmarks/GPU.md must have a row that starts with: {target}"


def test_frequent_ids_follow_zipfs_law_and_are_scattered() -> None:
    count, size = 1 << 10, 20_000
    numbers = zipf(count, size, torch.Generator().manual_seed(0), torch.device("cpu"))
    weights = torch.arange(1, count + 1, dtype=torch.float64) ** -1.05
    expected = size * weights / weights.sum()
    # Of a count with this mean, the standard deviation is at most its root; 5 of them for the most frequent numbers.
    found = numbers.bincount(minlength=count)[:20]
    assert bool(((found - expected[:20]).abs() < 5 * expected[:20].sqrt()).all())
    places = scattered(torch.arange(count), count)
    assert places.sort().values.tolist() == list(range(count))
    assert bool(((places[1:100] - places[:99]).abs() > 1).all())


@pytest.mark.parametrize("kind", ["uniform", "zipf", "hot"])
def test_training_batches_have_the_stated_numbers_of_ids(kind: str) -> None:
    for batch in gpu_steps._training_batches(Bench("cpu", TINY), kind, TINY.rows):
        distinct, counts = batch.unique(return_counts=True)
        assert (batch.numel(), distinct.numel()) == (TINY.ids, TINY.distinct)
        assert int(counts.sum()) == TINY.ids
