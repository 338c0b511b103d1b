"""What is done with one batch: forward, backward, update, and the gradients' sum over ranks.

The trainer, scripts and ``app`` may import it; it knows no stage and no trainer.
"""
