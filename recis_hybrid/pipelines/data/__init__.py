"""Where the batches of stages come from, and how far each source has been read.

The trainer may import it; it knows no step and no trainer.
"""
