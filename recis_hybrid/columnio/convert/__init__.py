"""Arrow columns to tensors, without a copy where the layouts agree.

All of ``columnio`` may import it; it knows no file.
"""
