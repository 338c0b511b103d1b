"""Sources of batches and their reading positions.

The trainer and scripts may import it. It imports ``pipelines.steps``, but not the trainer.
"""
