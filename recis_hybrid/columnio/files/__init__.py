"""Opening of files: paths, partitions, schemas, filters, and pieces.

``ColumnDataset`` and ``columnio.read`` may import it; it builds on ``columnio.formats`` and ``columnio.convert``.
"""
