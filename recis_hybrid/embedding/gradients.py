"""Exchange of the gradients of several tables at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from recis_hybrid.embedding.table.hash_table import Anchor, HashTable
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
