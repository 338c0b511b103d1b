"""Reading in a reproducible and resumable order: sampling, decoding, prefetching, delivery, position.

``ColumnDataset`` may import it; it builds on ``columnio.files`` and ``columnio.convert``.
"""
