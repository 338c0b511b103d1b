"""Gradients of several tables: their exchange at once, and features whose gradients are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from recis_hybrid.embedding.inputs import FeatureReader, TableReader
from recis_hybrid.embedding.table.hash_table import Anchor, HashTable
from recis_hybrid.ragged import Batch
from recis_hybrid.validation import describe_value


@contextmanager
def exchange_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Exchange the gradients of all tables among parameters at once, and not again within the block; collective.

    Other ranks may run backward at any time, so outside of such a block each read of an anchor's ``grad`` exchanges
    gradients, for which the host waits. ``torch.nn.utils.clip_grad_norm_`` reads the gradient of each table several
    times. On one process the block has no effect. :class:`TorchStep` uses it.

    Args:
        parameters: ``model.parameters()``, or those of an engine; all but tables are ignored.

    Raises:
        RuntimeError: If backward reaches one of the tables within the block.

    Example:
        >>> import torch
        >>> from recis_hybrid import optim
        >>> from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
        >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2)}, optimizer=optim.Adam)
        >>> optimizer = engine.make_optimizer(lr=0.1)
        >>> engine({"item": torch.tensor([1, 1, 2])})["item"].sum().backward()
        >>> with exchange_gradients(engine.parameters()):
        ...     norm = torch.nn.utils.clip_grad_norm_(engine.parameters(), max_norm=1.0)
        ...     optimizer.step()
    """
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(f"exchange_gradients: parameters must be model.parameters(), got {describe_value(parameters)}")
    anchors = [parameter for parameter in parameters if isinstance(parameter, Anchor)]
    tables = list(dict.fromkeys(anchor.table for anchor in anchors if not anchor.table.read_only))
    HashTable.announce_gradients(tables)
    for table in tables:
        table.fetch_gradients()
    remotes = [remote for table in tables if (remote := table.remote) is not None and not remote.exchanged]
    for remote in remotes:
        remote.exchanged = True
    try:
        yield
    finally:
        for remote in remotes:
            remote.exchanged = False


_MOST_FEATURES, _MOST_IDS = 4, 5


def non_finite_features(tables: Sequence[TableReader], batch: Batch, values: Mapping[str, Tensor]) -> list[str]:
    """Describe the features whose values are not finite; see ``EmbeddingEngine.describe_non_finite``."""
    found: list[tuple[float, str]] = []
    for reader in (reader for table in tables for reader in table.readers):
        if reader.name in values:
            finite, ids = _finite_vectors(reader, batch, values[reader.name])
            count, total = int((~finite).sum()), finite.numel()
            if count:
                shown = f"{ids[:_MOST_IDS]}{'' if len(ids) <= _MOST_IDS else f' and {len(ids) - _MOST_IDS:,} more'}"
                table = reader.config.table or reader.name
                text = f"feature {reader.name!r} of the table {table!r} ({count:,} of {total:,} vectors, ids {shown})"
                found.append((count / total, text))
    # A fault of the loss reaches all features, but a fault of one feature only some vectors of the others.
    texts = [text for _, text in sorted(found, key=lambda each: each[0])]
    rest = len(texts) - _MOST_FEATURES
    return texts if rest <= 0 else [*texts[:_MOST_FEATURES], f"{rest} more features"]


def _finite_vectors(reader: FeatureReader, batch: Batch, values: Tensor) -> tuple[Tensor, list[int]]:
    """Return which vectors of a feature are finite, bool ``[V]``, and the distinct ids of the others."""
    feature, _ = reader(batch, torch.device("cpu"))
    finite = values.detach().cpu().reshape(feature.vectors, -1).isfinite().all(1)
    vectors, ids = (~finite).nonzero().view(-1), feature.ids.cpu()
    if feature.offsets is None:
        return finite, list(dict.fromkeys(ids[vectors].tolist()))
    offsets = feature.offsets.cpu()
    bags = vectors // feature.tile if feature.tile else vectors
    starts, ends = offsets[bags], offsets[bags + 1]
    if feature.tile:
        starts = starts + vectors % feature.tile
        ends = torch.minimum(ends, starts + 1)
    spans = zip(starts.tolist(), ends.tolist(), strict=True)
    return finite, list(dict.fromkeys(one for start, end in spans for one in ids[start:end].tolist()))
