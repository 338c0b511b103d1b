"""JAX in the lead: a program's own jitted step with an engine's tables.

:class:`JaxTables` looks up ids and returns JAX arrays; :class:`JaxStep` is a step for ``pipelines.Trainer``. It imports
``bridge.exchange``, and gets the engine as an argument.
"""

from __future__ import annotations

from recis_hybrid.bridge.jax_led.step import JaxStep as JaxStep
from recis_hybrid.bridge.jax_led.tables import Engine as Engine, JaxLookup as JaxLookup, JaxTables as JaxTables

__all__ = ["Engine", "JaxLookup", "JaxStep", "JaxTables"]
