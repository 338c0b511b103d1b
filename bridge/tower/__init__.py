"""JAX functions as torch modules: adapters for frameworks, compiled programs, autograd, parameters.

Re-exported by ``recis_hybrid.bridge``; it builds on ``bridge.dlpack`` and ``bridge.exchange``.
"""
