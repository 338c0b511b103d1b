"""The state of tables as tensors, for saving and loading.

The engine may import it; it builds on ``embedding.table`` and the dataclasses of ``recis_hybrid.checkpointing``.
"""
