"""Where checkpoints lie: local directories and object stores, their leases, and how a checkpoint appears at once.

``Saver``, ``saver.actions`` and ``saver.checkpoint`` may import it; it imports ``saver.format`` at most.
"""
