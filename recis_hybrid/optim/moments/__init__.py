"""Optimizers with the moments of Adam, one rule a file.

Import them from :mod:`recis_hybrid.optim`.
"""
