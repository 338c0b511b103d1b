"""JitTables: an engine's tables, lent to jitted functions."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import jax
import torch

from recis_hybrid import ops
from recis_hybrid.accelerator import is_accelerator
from recis_hybrid.bridge.ffi.chain import ChainState, Counts
from recis_hybrid.bridge.ffi.native import handlers
from recis_hybrid.validation import check_integer, describe_value

_COMBINERS = {"sum": 0, "mean": 1, "sqrtn": 2, None: 0}


class Engine(Protocol):
    """The part of ``EmbeddingEngine`` in use."""

    configs: dict[str, Any]
    """Configs by feature."""
    plans: Any
    """For each table, its features and their member tables."""
    tables: Any
    """Tables, as ``HashTable``."""
    group: Any
    """Process group of shared tables, or None."""


class JitTables:
    """The tables of an EmbeddingEngine for lookups and updates inside ``jax.jit``, on the CPU or a GPU.

    :meth:`begin` lends the tables to JAX: it makes room for new ids, and returns a token for the first call.
    :func:`lookup` and :func:`update` take a token and return the next one, which orders them, so each token is used
    once. The last one is an output of the jitted function, and goes to :meth:`end`. In between, any number of jitted
    functions may use the tables. Afterwards, whatever uses them through torch (a lookup, a save, an eviction) first
    waits for that token; before, it raises.

    Tables, 64-bit ids, optimizer state and checkpoints are those of the engine, and training is bitwise that of
    ``JaxTables``. Hyperparameters are read in :meth:`begin`, and each update counts as a step of the optimizer.

    On a GPU, calls run on the stream of the jitted function and never wait for the host. :meth:`begin` waits for the
    last token of :meth:`end`, so let it serve many steps.

    Args:
        engine: An ``EmbeddingEngine`` of one process, on the CPU or a GPU that JAX can use.
        optimizer: An optimizer of ``recis_hybrid.optim`` for the engine; None for lookups without updates.

    Raises:
        ImportError: If the XLA handlers were not built.
        NotImplementedError: If a feature or table has a setting that is not supported inside jit: weights,
            ``max_length``, the combiners ``max`` and ``tile``, admission, a frozen feature of a trained table, a cache,
            memory of several devices, or several ranks.
        TypeError: If ``engine`` is not an engine, or the optimizer has no rule for use inside jit.

    Example:
        >>> import jax.numpy as jnp
        >>> from recis_hybrid import embedding, optim
        >>> from recis_hybrid.bridge import ffi
        >>> engine = embedding.EmbeddingEngine({"item": embedding.EmbeddingConfig(dim=4)}, optimizer=optim.SGD)
        >>> tables = ffi.JitTables(engine, engine.make_optimizer(lr=1.0))
        >>> @jax.jit
        ... def step(ids, token):
        ...     vectors, ctx, token = ffi.lookup(tables, {"item": ids}, None, token)
        ...     gradients = jax.grad(lambda vectors: vectors["item"].sum())(vectors)
        ...     return vectors["item"], ffi.update(tables, ctx, gradients, token)
        >>> vectors, token = step(jnp.array([5, 7, 5]), tables.begin(room=2))
        >>> tables.end(token)
        >>> len(engine.tables[0])
        2
    """

    def __init__(self, engine: Engine, optimizer: Any = None) -> None:
        if isinstance(engine, type) or not hasattr(engine, "plans"):
            raise TypeError(f"JitTables: engine must be an EmbeddingEngine, got {describe_value(engine)}")
        _refuse_unsupported(engine)
        self.engine = engine
        self.optimizer = optimizer
        self.trained = [optimizer is not None and not table.read_only for table in engine.tables]
        """For each table, True if updates change it."""
        for table, trained in zip(engine.tables, self.trained, strict=True):
            if trained:
                optimizer.rule(table.anchor)  # raises TypeError if it has no rule for use inside jit
        self.device: torch.device = engine.tables[0].device
        """Device of the tables."""
        self.platform = "cuda" if self.device.type == "cuda" else "cpu"
        """Platform of JAX whose functions may use the tables."""
        native, count = handlers(self.platform), len(engine.tables)
        self._state = ChainState(native.state_words(count), count, self.device)
        number = (self.device.index or 0) if self.platform == "cuda" else -1
        self._chain = native.Chain(ops.table_kernels(self.device.type), self._state.address, count, number)
        if is_accelerator(self.device):
            # Calls that nobody waits for may still be queued when this object is dropped.
            weakref.finalize(self, torch.accelerator.synchronize, self.device).atexit = False
        self._lent = False
        self._last: jax.Array | None = None

    @property
    def chain(self) -> int:
        """Number by which compiled functions find the tables."""
        return int(self._chain.number)

    def begin(self, room: int) -> jax.Array:
        """Lend the tables to JAX.

        Args:
            room: Number of new ids for which each table has room until :meth:`end`. Counted are distinct ids, by table.

        Returns:
            The token of the first lookup, float32 ``[2]``.

        Raises:
            RuntimeError: If the calls up to the last :meth:`end` failed, or a table has pending gradients.
        """
        check_integer("JitTables.begin", "room", room, low=0)
        self._settle()
        if self._lent:  # the calls since the last begin were abandoned
            self._stop()
        for number, table in enumerate(self.engine.tables):
            self._chain.set_memory(number, *table.lend(room, self._return))
            if self.trained[number]:
                rule, steps = self.optimizer.rule(table.anchor)
                self._chain.set_rule(number, rule.kind, rule.offsets, rule.values, steps)
        token = self._state.start()
        self._chain.lend(True)
        self._lent = True
        return token

    def end(self, token: jax.Array) -> None:
        """Take the last token of the calls since :meth:`begin`, without waiting for them.

        The next use of the tables waits, and raises RuntimeError if a call failed: because there were more new ids than
        ``room``, because a token was used twice or was not the last, or because the update of a training lookup did not
        run. After the first failed call, no later one changes a table.

        Args:
            token: The token of the last lookup or update, an output of the jitted function.

        Raises:
            RuntimeError: If the tables are not lent.
            TypeError: If ``token`` is not a token, or is traced.
        """
        if not isinstance(token, jax.Array) or isinstance(token, jax.core.Tracer) or token.shape != (2,):
            raise TypeError(
                f"JitTables.end: token must be the last token that a jitted function returned, got "
                f"{describe_value(token)}; call end outside jit"
            )
        if not self._lent or self._last is not None:
            raise RuntimeError("JitTables.end: the tables are not lent; call begin before the jitted function")
        self._last = token

    def wait(self) -> None:
        """Wait for the calls up to the last :meth:`end`, and raise RuntimeError if one failed."""
        self._settle()

    def _return(self) -> None:
        """Take the tables back for a use through torch."""
        if self._lent and self._last is None:
            raise RuntimeError(
                f"the tables {self._names()} are lent to JAX since JitTables.begin; pass the last token of the jitted "
                "function to JitTables.end before they are used through torch"
            )
        self._settle()

    def _settle(self) -> None:
        """Wait for the last token, take the tables back, and raise if a call failed."""
        token, self._last = self._last, None
        if token is None:
            return
        try:
            token.block_until_ready()
        finally:
            counts = self._stop()
        if counts.status:
            raise RuntimeError(self._message(counts.status, self.engine.tables[counts.failed].name))
        if float(token[0]) != counts.serial:
            raise RuntimeError(
                f"JitTables.end: the tables {self._names()} were used after the token that end got; pass the token of "
                "the last lookup or update"
            )
        if any(counts.unseen):
            names = [table.name for table, unseen in zip(self.engine.tables, counts.unseen, strict=True) if unseen]
            raise RuntimeError(
                f"JitTables: training lookups in the tables {'; '.join(names)} had no update: the token of "
                "the update must be an output of the jitted function, or XLA drops the update; use train=False where "
                "there is none"
            )

    def _stop(self) -> Counts:
        """Refuse further calls, wait for those that have begun, take the tables back, and count their steps."""
        self._chain.lend(False)
        if is_accelerator(self.device):
            torch.accelerator.synchronize(self.device)  # all streams, also those of JAX
        counts = self._state.read()
        for table, trained, steps in zip(self.engine.tables, self.trained, counts.steps, strict=True):
            table.take_back()
            if trained:
                self.optimizer.count_steps(table.anchor, steps)
        self._lent = False
        return counts

    def _names(self) -> str:
        return "; ".join(table.name for table in self.engine.tables)

    @staticmethod
    def _message(status: int, name: str) -> str:
        unchanged = "This call and later ones changed no table, earlier ones are complete"
        return {
            1: f"table {name}: a lookup inside jit had more new ids than there was room for. {unchanged}: repeat them "
            "with a larger JitTables.begin(room=)",
            2: f"table {name}: a lookup or update inside jit got a token that is not that of the call before. "
            f"{unchanged}. Each call must get the token of the one before, once; jax.checkpoint repeats lookups, so "
            "keep them out of it",
            3: f"table {name}: an update inside jit got a lookup from before rows of the table were removed or moved. "
            f"{unchanged}: look up again",
            4: f"table {name}: in a lookup inside jit, the offsets of a feature must start with 0, must not decrease, "
            f"and must not exceed the number of ids. {unchanged}",
        }[status]


def combiner_of(config: Any) -> int:
    """Return the kernels' number of a feature's combiner."""
    return _COMBINERS[config.combiner]


def _refuse_unsupported(engine: Engine) -> None:
    remedy = "use bridge.jax_led.JaxTables"
    if engine.group is not None:
        raise NotImplementedError(f"JitTables: tables that ranks share cannot be looked up inside jit; {remedy}")
    for name, config in engine.configs.items():
        if config.combiner not in _COMBINERS:
            raise NotImplementedError(
                f"JitTables: feature {name!r}: inside jit the combiner must be one of {list(_COMBINERS)}, got "
                f"{config.combiner!r}; {remedy}"
            )
        for setting in ("weights", "max_length", "admission"):
            if getattr(config, setting) is not None:
                raise NotImplementedError(f"JitTables: feature {name!r}: {setting} is not supported in jit; {remedy}")
    for plan in engine.plans:
        if plan.frozen:
            raise NotImplementedError(
                f"JitTables: feature {plan.frozen[0]!r}: trainable=False in a table that other features train is not "
                f"supported in jit; {remedy}"
            )
    devices = {str(where) for table in engine.tables for where in (table.device, table.store.map_device)}
    if len(devices) > 1:
        raise NotImplementedError(f"JitTables: all tables must be on one device, got {sorted(devices)}; {remedy}")
    for table in engine.tables:
        where = f"JitTables: table {table.name}"
        if ops.table_kernels(table.device.type) is None:
            raise NotImplementedError(f"{where}: it is on {table.device}, for which no library is loaded; {remedy}")
        if table.store.placement.cache_bytes and not table.store.on_disk:  # lending refuses the latter
            raise NotImplementedError(f"{where}: a cache of records is not supported inside jit; {remedy}")
        if table.before_read is not None:
            raise NotImplementedError(f"{where}: before_read cannot run inside jit; {remedy}")
    if not is_known_to_jax(engine.tables[0].device):
        raise NotImplementedError(
            f"JitTables: the tables are on {engine.tables[0].device}, and JAX has no CUDA backend here; install "
            "jax[cuda13] or jax[cuda12], or put the tables on the CPU"
        )


def is_known_to_jax(device: torch.device) -> bool:
    """Return whether JAX can run on a device of torch; the emulated one of the tests is its CPU."""
    if device.type != "cuda":
        return True
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False
