"""Conversion of Arrow columns to tensors, without copying if the layouts agree.

All of ``columnio`` may import it; it does not depend on files.
"""
