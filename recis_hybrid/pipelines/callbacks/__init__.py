"""Built-in callbacks: checkpoints, early stopping, logs, progress, profiles.

Scripts and ``app`` may import it. The trainer does not; it depends on ``pipelines.callback`` only.
"""
