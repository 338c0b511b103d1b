"""From features to native calls: the plan, the fused program, and the part of readers.

The engine may import it; it builds on ``features.op`` and ``recis_hybrid.ops``.
"""
