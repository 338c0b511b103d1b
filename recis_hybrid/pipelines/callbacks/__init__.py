"""Callbacks that come with the package: checkpoints, early stopping, logs, learning rates.

Scripts and ``app`` may import it; the trainer does not, it knows ``pipelines.callback`` only.
"""
