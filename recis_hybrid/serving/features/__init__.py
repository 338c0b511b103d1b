"""The operators of ``recis_hybrid.features`` in NumPy, bit for bit. Only ``serving.bundle`` imports it."""
