"""Decisions made once, before an engine is built: which tables are coalesced, and how they are sharded.

The engine and ``embedding.distributed`` may import this package. It reads configurations and accesses no table.
"""
