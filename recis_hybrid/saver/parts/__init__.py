"""Live objects as parts of a checkpoint: modules, optimizers, anything with a ``state_dict``.

``Saver``, ``saver.actions`` and ``saver.checkpoint`` may import it; it does not access files.
"""
