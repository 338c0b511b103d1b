"""Sources of batches, and the position in each.

The trainer and scripts may import it; it does not know the trainer.
"""
