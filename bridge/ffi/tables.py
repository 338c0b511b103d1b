"""JitTables: an engine's tables, lent to jitted functions."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

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
    """The tables of an EmbeddingEngine for lookups and updates inside ``jax.jit``, on the CPU.

    :meth:`begin` lends the tables to JAX: it makes room for new ids, and returns a token for the first call.
    :func:`lookup` and :func:`update` take a token and return the next one, which orders them, so each token is used
    once. The last one is an output of the jitted function, and goes to :meth:`end`. In between, any number of jitted
    functions may use the tables. Afterwards, whatever uses them through torch (a lookup, a save, an eviction) first
    waits for that token; before, it raises.

    Tables, 64-bit ids, optimizer state and checkpoints are those of the engine, and training is bitwise that of
    ``JaxTables``. Hyperparameters are read in :meth:`begin`, and each update counts as a step of the optimizer.

    Args:
        engine: An ``EmbeddingEngine`` on the CPU, of one process.
        optimizer: An optimizer of ``recis_hybrid.optim`` for the engine; None for lookups without updates.

    Raises:
        ImportError: If the XLA handlers were not built.
        NotImplementedError: If a feature or table has a setting that is not supported inside jit: weights,
            ``max_length``, the combiners ``max`` and ``tile``, admission, a frozen feature of a trained table, GPU
            memory, or several ranks.
        TypeError: If ``engine`` is not an engine, or the optimizer has no rule for use inside jit.

    Example:
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
        self._native = handlers()
        self._chain = self._native.Chain(len(engine.tables))
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
        if self._lent:  # the calls since the last begin were abandoned; none is running, and later ones will be refused
            self._chain.refuse()
            self._reclaim()
        for number, table in enumerate(self.engine.tables):
            self._chain.set_memory(number, *table.lend(room, self._return))
            if self.trained[number]:
                rule, steps = self.optimizer.rule(table.anchor)
                beta1, beta2 = rule.betas
                self._chain.set_rule(
                    number, rule.kind, rule.offsets, rule.lr, beta1, beta2, rule.eps, rule.weight_decay, steps
                )
        self._lent = True
        return jnp.asarray(np.array([self._chain.begin(), 0], np.float32))

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
        token.block_until_ready()
        without_update = self._reclaim()
        serial, status, failed, reason = self._chain.state()
        if status:
            raise RuntimeError(self._message(status, self.engine.tables[failed].name, reason))
        if float(token[0]) != serial:
            raise RuntimeError(
                f"JitTables.end: the tables {self._names()} were used after the token that end got; pass the token of "
                "the last lookup or update"
            )
        if without_update:
            raise RuntimeError(
                f"JitTables: training lookups in the tables {'; '.join(without_update)} had no update: the token of "
                "the update must be an output of the jitted function, or XLA drops the update; use train=False where "
                "there is none"
            )

    def _reclaim(self) -> list[str]:
        """Take the tables back, count their steps, and return those with a training lookup without an update."""
        without_update = []
        for number, table in enumerate(self.engine.tables):
            table.take_back()
            if self._lent and self.trained[number]:
                _, steps, unseen = self._chain.counts(number)
                self.optimizer.count_steps(table.anchor, steps - self.optimizer.rule(table.anchor)[1])
                if unseen:
                    without_update.append(table.name)
        self._lent = False
        return without_update

    def _names(self) -> str:
        return "; ".join(table.name for table in self.engine.tables)

    @staticmethod
    def _message(status: int, name: str, reason: str) -> str:
        unchanged = "This call and later ones changed no table, earlier ones are complete"
        return {
            1: f"table {name}: a lookup inside jit had more new ids than there was room for. {unchanged}: repeat them "
            "with a larger JitTables.begin(room=)",
            2: f"table {name}: a lookup or update inside jit got a token that is not that of the call before. "
            f"{unchanged}. Each call must get the token of the one before, once; jax.checkpoint repeats lookups, so "
            "keep them out of it",
            3: f"table {name}: an update inside jit got a lookup from before rows of the table were removed or moved. "
            f"{unchanged}: look up again",
        }.get(status, f"table {name}: a call inside jit failed: {reason}. {unchanged}")


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
    for table in engine.tables:
        if table.device.type != "cpu" or table.store.map_device.type != "cpu":
            raise NotImplementedError(f"JitTables: table {table.name}: it must be on the CPU; {remedy}")
        if table.before_read is not None:
            raise NotImplementedError(f"JitTables: table {table.name}: before_read cannot run inside jit; {remedy}")
