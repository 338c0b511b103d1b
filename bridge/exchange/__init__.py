"""Exchange of tensors and arrays between torch and JAX, in shared memory.

All of ``recis_hybrid.bridge`` may import it. It imports nothing else from the package.
"""
