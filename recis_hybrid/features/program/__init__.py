"""From features to native calls: the plan, the fused program, and what readers compute in their threads.

The engine may import it; it builds on ``features.op`` and ``recis_hybrid.ops``.
"""
