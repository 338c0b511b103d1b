"""One hash table on one process: ids to rows, rows to records, and the gradients of rows.

The rest of ``embedding`` may import this package. It imports ``ops``, and only those modules of ``embedding`` that do
not depend on tables.
"""
