"""Files before their rows are read: paths, partitions, schemas, filters, and the pieces they consist of.

``ColumnDataset`` and ``columnio.read`` may import it; it builds on ``columnio.formats`` and ``columnio.convert``.
"""
