"""The state of tables as tensors: what a saver writes, and how it is loaded again.

The engine may import it; it builds on ``embedding.table`` and the dataclasses of ``recis_hybrid.checkpointing``.
"""
