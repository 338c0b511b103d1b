"""Exchange of tensors and arrays between torch and JAX, in shared memory.

All of ``recis_hybrid.bridge`` may import it, and it imports nothing else of the package.
"""
