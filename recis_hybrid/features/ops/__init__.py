"""The operations on features that come with the package, one file for each family.

The registry and the engine may import it; it builds on ``features.op`` and ``features.common``.
"""
