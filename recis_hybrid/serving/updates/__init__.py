"""Updates of bundles in production: chains of incremental bundles, followed by a live bundle or by Redis.

The package's own ``__init__`` and ``app`` may import it.
"""
