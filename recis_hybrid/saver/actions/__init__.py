"""Actions on checkpoints: write, load, load partially, import.

``Saver`` and the commands may import it; it builds on all other packages of ``saver``.
"""
