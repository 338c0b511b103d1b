"""Directories and object stores of checkpoints: leases, commits by one atomic step, and the listing of steps.

``Saver``, ``saver.actions`` and ``saver.checkpoint`` may import it; it imports ``saver.format`` and ``saver.runtime``.
"""
