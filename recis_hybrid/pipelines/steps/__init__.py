"""Training steps: forward, backward, update, and gradient averaging over ranks.

The trainer, ``pipelines.data``, scripts and ``app`` may import it. It imports neither stages nor the trainer.
"""
