"""Conversion of Arrow columns to tensors, without a copy if the layouts agree.

All of ``columnio`` may import it; it knows no file.
"""
