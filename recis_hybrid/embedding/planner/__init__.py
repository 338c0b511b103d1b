"""Decisions taken once, before an engine is built: which tables become one, and which rank holds which columns.

The engine and ``embedding.distributed`` may import it; it reads configurations and touches no table.
"""
