"""A checkpoint and the chain it builds on: the files of its parts and tables, and the changes since its base.

``saver.actions`` and ``Saver`` may import it; it builds on ``saver.parts``, ``saver.format`` and ``saver.runtime``.
"""
