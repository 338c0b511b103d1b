"""Training steps: forward, backward, update, and the sum of gradients over ranks.

The trainer, scripts and ``app`` may import it; it knows neither stages nor the trainer.
"""
