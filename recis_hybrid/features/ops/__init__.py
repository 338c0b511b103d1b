"""The operations on features that come with the package, a family a file.

The registry and the engine may import it; it builds on ``features.op`` and ``features.common``.
"""
