"""Reading in an order that can be repeated and resumed: sampling, decoding, prefetching, delivery, position.

``ColumnDataset`` may import it; it builds on ``columnio.files`` and ``columnio.convert``.
"""
