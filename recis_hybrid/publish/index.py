"""Vector indexes of item embeddings, for retrieval with two-tower models.

Letters: n items, q queries, D dim, k neighbors of a query.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_hybrid.checkpointing import BUCKETS
from recis_hybrid.publish.features import PublishError
from recis_hybrid.ragged import Batch
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from recis_hybrid.saver.format.row_file import Reads
from recis_hybrid.validation import check_choice, check_integer

Metric: TypeAlias = Literal["inner_product", "cosine"]
METRICS: tuple[Metric, ...] = ("inner_product", "cosine")
Vectors: TypeAlias = "Iterable[tuple[Tensor, Tensor]]"
"""Pieces of the items: ids, int64 ``[m]``, any values, each once; and vectors, floating point ``[m, D]``."""

_MOST_WIDENED = 4096
_SAMPLE_OF_IVF = 256  # rows for each list: faiss ignores more


@dataclass(frozen=True, kw_only=True)
class Flat:
    """Exact search, which compares a query with all items: for some 100,000 items at most."""

    kind: ClassVar[str] = "flat"
    width: ClassVar[str | None] = None


@dataclass(frozen=True, kw_only=True)
class HNSW:
    """A graph of near items: the fastest search, at ``8 * links`` more bytes an item.

    References:
        Y. Malkov and D. Yashunin: Efficient and robust approximate nearest neighbor search using Hierarchical
        Navigable Small World graphs. IEEE TPAMI 42(4), 2020.
    """

    links: int = 32
    """Neighbors of an item in the graph, from 2; twice as many in its lowest layer."""
    ef_construction: int = 200
    """Candidates that are kept when an item is inserted."""
    ef_search: int = 64
    """Candidates that a search keeps; raised until the index has the required recall."""
    kind: ClassVar[str] = "hnsw"
    width: ClassVar[str | None] = "ef_search"


@dataclass(frozen=True, kw_only=True)
class IVF:
    """Lists of items around the centers of k-means: built fastest, with 8 more bytes an item.

    References:
        J. Sivic and A. Zisserman: Video Google: A text retrieval approach to object matching in videos. ICCV 2003.
    """

    lists: int | None = None
    """Number of lists; None: 4 * sqrt(n), but with 39 items or more on average."""
    probes: int = 16
    """Lists that a search reads; raised until the index has the required recall."""
    kind: ClassVar[str] = "ivf"
    width: ClassVar[str | None] = "probes"


KINDS: dict[str, type[Flat] | type[HNSW] | type[IVF]] = {"hnsw": HNSW, "ivf": IVF, "flat": Flat}
"""Kinds of indexes by name."""


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """Description of a written index, also stored beside it as ``FILE.json``."""

    kind: str
    """One of ``KINDS``."""
    parameters: dict[str, int]
    """Parameters of the kind, as used."""
    metric: str
    """``inner_product`` or ``cosine``."""
    rows: int
    """n."""
    dim: int
    """D."""
    k: int
    """Number of neighbors for which the recall was measured, at most n."""
    recall: float
    """Share of the k nearest items of a query that a search finds, on average."""
    queries: int
    """Number of queries for which the recall was measured."""
    sha256: str
    """Digest of the index file."""
    source: dict[str, Any] = field(default_factory=dict)
    """Origin of the vectors, such as step and digest of a checkpoint, and the table."""


def write_index(
    path: str | os.PathLike[str],
    vectors: Vectors,
    *,
    index: Flat | HNSW | IVF | None = None,
    metric: Metric = "inner_product",
    queries: npt.ArrayLike | Tensor | None = None,
    recall: float = 0.95,
    k: int = 10,
    threads: int | None = None,
    source: dict[str, Any] | None = None,
) -> IndexReport:
    """Write item vectors to a vector index of faiss, and measure its recall against exact search.

    ``faiss.read_index(path).search(queries, k)`` returns scores and ids. For the metric ``cosine``, items are
    normalized here, and queries must be normalized by the caller. Missing neighbors have the id -1, which may also be
    the id of an item, and then a score of ``-inf`` or the lowest float32.

    While a graph is built, the vectors are in memory three times, otherwise once. On one thread, equal vectors in equal
    order yield equal bytes.

    Args:
        path: File to write; ``path.json`` is written beside it, see :class:`IndexReport`.
        vectors: Pieces of the items, as from :func:`table_vectors` or :func:`tower_vectors`.
        index: Kind and parameters; None: ``HNSW()``.
        metric: ``inner_product``, as two-tower models are trained, or ``cosine``.
        queries: Floating point ``[q, D]``, vectors of users for which the recall is measured; None: 1,000 random items.
        recall: Required recall. The parameter of the search (``ef_search`` or ``probes``) is doubled until it is
            reached, and stored in the file. A warning says if it cannot be reached.
        k: Number of neighbors for which the recall is measured.
        threads: Threads for building; None: as many as torch uses.
        source: Origin of the vectors, for the report.

    Returns:
        The report.

    Raises:
        ImportError: faiss is not installed.
        PublishError: There is no item, shapes differ, a vector is not finite, or two items have the same id.
        ValueError: An argument is out of range.
    """
    index = HNSW() if index is None else index
    check_choice("write_index", "metric", metric, METRICS)
    check_integer("write_index", "k", k, low=1)
    if not 0 <= recall <= 1:
        raise PublishError(f"write_index: recall must be from 0 to 1, got {recall}")
    faiss = _faiss()
    before = faiss.omp_get_max_threads()
    # faiss has an OpenMP runtime of its own beside torch's, each with a thread for every core.
    faiss.omp_set_num_threads(torch.get_num_threads() if threads is None else threads)
    try:
        ids, pieces = _checked(vectors, metric)
        rows, dim = ids.size, pieces[0].shape[1]
        asked = _queries(queries, pieces, dim, metric)
        mapped, built, used = _build(faiss, index, ids, pieces, dim)
        k = min(k, rows)
        exact = _exact(faiss, built, asked, k)
        used, reached = _widened(faiss, built, used, asked, exact, recall, k)
        if reached < recall:
            warnings.warn(
                f"write_index: recall@{k} is {reached:.3f}, below {recall}, with {asdict(used)}; use another kind of "
                "index, or more links or lists",
                RuntimeWarning,
                stacklevel=2,
            )
        digest = _write(faiss, mapped, Path(path))
    finally:
        faiss.omp_set_num_threads(before)
    parameters = {name: int(value) for name, value in asdict(used).items()}
    report = IndexReport(
        kind=index.kind,
        parameters=parameters,
        metric=metric,
        rows=rows,
        dim=dim,
        k=k,
        recall=reached,
        queries=len(asked),
        sha256=digest,
        source=dict(source or {}),
    )
    described = Path(f"{os.fspath(path)}.json")
    partial = described.with_name(f".{described.name}.partial")
    partial.write_text(json.dumps(asdict(report), indent=1) + "\n")
    os.replace(partial, described)
    return report


def table_vectors(checkpoint: StoredCheckpoint, table: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and embeddings of a table of a checkpoint, in pieces.

    Args:
        checkpoint: A checkpoint of a run, incremental or full.
        table: Name of the table.

    Yields:
        Ids, int64 ``[m]``, and embeddings, ``[m, D]``, in the order of the files, which is the same for equal tables.

    Raises:
        CorruptCheckpoint: The checkpoint, or one that it builds on, is damaged.
        PublishError: There is no such table, several parts have one, or it is quantized.
    """
    parts = checkpoint.manifest.parts
    found = [name for name, part in parts.items() if table in part.tables]
    if len(found) != 1:
        tables = sorted({name for part in parts.values() for name in part.tables})
        raise PublishError(f"{checkpoint.directory}: must have one table {table!r}, has {len(found)}; tables: {tables}")
    entry = parts[found[0]].tables[table]
    spec = entry.columns.get("embedding")
    if spec is None or not getattr(torch, spec.dtype).is_floating_point:
        raise PublishError(
            f"{checkpoint.directory}: table {table!r} has no embeddings as floating-point numbers; use the checkpoint "
            "of the training"
        )
    for rows in checkpoint.pieces(found[0], table, (0, BUCKETS), Reads()):
        yield rows.columns["ids"], rows.columns["embedding"]


def tower_vectors(
    tower: Callable[[Batch], Tensor], batches: Iterable[Batch], ids: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and vectors of items that a tower computes.

    Args:
        tower: Takes a batch and returns the vectors of its rows, ``[B, D]``, such as the item side of a two-tower model
            in evaluation mode.
        batches: Batches of items, each item once, such as a ColumnDataset.
        ids: Name of the column with the items' ids, int64 ``[B]``.

    Yields:
        Ids and vectors, by batch.

    Raises:
        PublishError: A batch lacks the column.
    """
    for batch in batches:
        if not isinstance(column := batch.get(ids), Tensor):
            raise PublishError(f"tower_vectors: a batch must have {ids!r}, int64 [B], it has {sorted(batch)}")
        with torch.no_grad():
            yield column, tower(batch)


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ImportError(
            f"write_index: there is no module {error.name!r}; run `pip install recis_hybrid[retrieval]`"
        ) from error
    return faiss


def _checked(vectors: Vectors, metric: Metric) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.float32]]]:
    """Return all ids, and the vectors in pieces, normalized for the metric."""
    ids: list[npt.NDArray[np.int64]] = []
    pieces: list[npt.NDArray[np.float32]] = []
    for number, (of, values) in enumerate(vectors):
        where = f"write_index: piece {number}"
        if of.dtype != torch.int64 or of.dim() != 1:
            raise PublishError(f"{where}: ids must be int64 [m], got {of.dtype} {list(of.shape)}")
        dim = pieces[0].shape[1] if pieces else values.shape[-1]
        if not values.is_floating_point() or values.shape != (len(of), dim) or dim == 0:
            raise PublishError(
                f"{where}: vectors must be floating point [{len(of)}, {dim}], got {values.dtype} {list(values.shape)}"
            )
        ids.append(of.cpu().numpy())
        pieces.append(_normalized(values.detach().to("cpu", torch.float32, copy=True).numpy(), metric))
        finite = np.isfinite(pieces[-1]).all(axis=1)
        if not finite.all():
            raise PublishError(f"{where}: the vector of the item {ids[-1][~finite][0]} is not finite")
    every = np.concatenate(ids) if ids else np.empty(0, np.int64)
    if every.size == 0:
        raise PublishError("write_index: there are no items")
    ordered = np.sort(every)
    if (repeated := ordered[1:][ordered[1:] == ordered[:-1]]).size:
        raise PublishError(f"write_index: the item {repeated[0]} occurs more than once; pass each item once")
    return every, pieces


def _normalized(vectors: npt.NDArray[np.float32], metric: Metric) -> npt.NDArray[np.float32]:
    if metric == "cosine":
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        np.divide(vectors, lengths, out=vectors, where=lengths > 0)
    return vectors


def _queries(given: Any, pieces: list[npt.NDArray[np.float32]], dim: int, metric: Metric) -> npt.NDArray[np.float32]:
    """Return the queries for which the recall is measured."""
    if given is None:
        return _sample(pieces, 1000)
    asked = np.array(given.detach().cpu().float().numpy() if isinstance(given, Tensor) else given, np.float32)
    if asked.ndim != 2 or asked.shape[1] != dim or len(asked) == 0 or not np.isfinite(asked).all():
        raise PublishError(f"write_index: queries must be finite numbers [q, {dim}], got {list(asked.shape)}")
    return _normalized(asked, metric)


def _sample(pieces: list[npt.NDArray[np.float32]], rows: int) -> npt.NDArray[np.float32]:
    """Return random vectors, the same for equal pieces, or all if there are fewer."""
    starts = np.cumsum([0, *(len(piece) for piece in pieces)])
    total = int(starts[-1])
    chosen = np.sort(np.random.default_rng(0).choice(total, min(rows, total), replace=False))
    bounds = np.searchsorted(chosen, starts)
    return np.concatenate(
        [piece[chosen[bounds[i] : bounds[i + 1]] - starts[i]] for i, piece in enumerate(pieces)], dtype=np.float32
    )


def _build(
    faiss: Any,
    index: Flat | HNSW | IVF,
    ids: npt.NDArray[np.int64],
    pieces: list[npt.NDArray[np.float32]],
    dim: int,
) -> tuple[Any, Any, Flat | HNSW | IVF]:
    """Return an index of ids, the index of their positions within it, and the parameters as used; empties the list."""
    rows = len(ids)
    built: Any
    if isinstance(index, HNSW):
        built = faiss.IndexHNSWFlat(dim, check_integer("HNSW", "links", index.links, low=2), faiss.METRIC_INNER_PRODUCT)
        check_integer("HNSW", "ef_construction", index.ef_construction, low=1)
    elif isinstance(index, IVF):
        lists = index.lists or max(1, min(int(4 * math.sqrt(rows)), rows // 39))
        if not 1 <= lists <= rows:
            raise PublishError(f"IVF: lists must be from 1 to the number of items, {rows}, got {index.lists}")
        index = IVF(lists=lists, probes=min(check_integer("IVF", "probes", index.probes, low=1), lists))
        built = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
        built.cp.min_points_per_centroid = 1  # the caller may want few items in a list
        built.train(_sample(pieces, _SAMPLE_OF_IVF * lists))
    else:
        built = faiss.IndexFlatIP(dim)
    mapped = faiss.IndexIDMap(built)
    if isinstance(index, HNSW):
        lengthened = _lengthened(faiss, index, pieces, dim)
        built.hnsw = lengthened.hnsw  # a copy of the graph
        built.hnsw.is_similarity = True
        del lengthened
    pieces.reverse()
    while pieces:
        piece = np.ascontiguousarray(pieces.pop())
        # The graph exists already; only its vectors are added.
        (built.storage if isinstance(index, HNSW) else built).add(piece)
    built.ntotal = mapped.ntotal = rows
    faiss.copy_array_to_vector(ids, mapped.id_map)
    return mapped, built, index


def _lengthened(faiss: Any, index: HNSW, pieces: list[npt.NDArray[np.float32]], dim: int) -> Any:
    """Return an index of vectors with one more element, whose graph serves for inner products.

    In a graph by inner products, items with short vectors are nobody's neighbors, and so are never found. Therefore the
    vectors get one more element, with which all have the same length, and the graph is that of their distances. A query
    with a zero there has the same order of items by distance as by inner product without it, so the graph can be
    searched by inner products of the vectors as they are.

    References:
        Y. Bachrach et al.: Speeding up the Xbox recommender system using a Euclidean transformation for inner-product
        spaces. RecSys 2014.
    """
    squares = [np.einsum("nd,nd->n", piece, piece, dtype=np.float64) for piece in pieces]
    longest = max(float(each.max()) for each in squares if len(each))
    lengthened = faiss.IndexHNSWFlat(dim + 1, index.links)
    lengthened.hnsw.efConstruction = index.ef_construction
    for piece, square in zip(pieces, squares, strict=True):
        lengthened.add(np.column_stack([piece, np.sqrt(longest - square)]).astype(np.float32))
    return lengthened


def _exact(faiss: Any, built: Any, asked: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.float32]:
    """Return the score of the k-th nearest item of each query, by a search of all vectors in the index."""
    if isinstance(built, faiss.IndexHNSWFlat):
        scores, _ = built.storage.search(asked, k)
    else:
        every = {"params": faiss.SearchParametersIVF(nprobe=built.nlist)} if hasattr(built, "nlist") else {}
        scores, _ = built.search(asked, k, **every)
    last: npt.NDArray[np.float32] = scores[:, -1]
    return last


def _widened(
    faiss: Any,
    built: Any,
    index: Flat | HNSW | IVF,
    asked: npt.NDArray[np.float32],
    exact: npt.NDArray[np.float32],
    recall: float,
    k: int,
) -> tuple[Flat | HNSW | IVF, float]:
    """Raise the parameter of the search until the recall is reached; return the parameters and the recall."""
    while True:
        most = 0
        if isinstance(index, HNSW):
            built.hnsw.efSearch = max(check_integer("HNSW", "ef_search", index.ef_search, low=1), k)
            index, most = HNSW(**asdict(index) | {"ef_search": built.hnsw.efSearch}), min(built.ntotal, _MOST_WIDENED)
        elif isinstance(index, IVF):
            built.nprobe, most = index.probes, built.nlist
        scores, _ = built.search(asked, k)
        # By score, so that items with equal scores may replace each other, within the rounding of sums in other orders.
        slack = 4 * np.finfo(np.float32).eps * asked.shape[1] * np.abs(exact)
        reached = float((scores >= (exact - slack)[:, None]).mean())
        width = 0 if index.width is None else getattr(index, index.width)
        if reached >= recall or width >= most or index.width is None:
            return index, reached
        index = type(index)(**asdict(index) | {index.width: min(2 * width, most)})


def _write(faiss: Any, index: Any, path: Path) -> str:
    """Write the index under a temporary name, sync and rename it; return its SHA-256."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        faiss.write_index(index, os.fspath(partial))
        with open(partial, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return digest
