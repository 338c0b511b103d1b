"""Callbacks of the package: checkpoints, early stopping, logs, progress, profiles.

Scripts and ``app`` may import it; the trainer does not, it only knows ``pipelines.callback``.
"""
