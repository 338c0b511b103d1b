"""One hash table on one process: ids to rows, rows to records, and the gradients of rows.

The rest of ``embedding`` may import it; it imports ``ops``, and of ``embedding`` only modules that know no table.
"""
