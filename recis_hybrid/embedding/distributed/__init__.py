"""Tables sharded over ranks: deduplicated ids out, rows back, gradients to their owners.

The engine may import this package, which builds on ``embedding.table`` and ``embedding.planner``.
"""
