"""JAX functions as torch modules: compiled programs, autograd, parameters, adapters for JAX frameworks.

``recis_hybrid.bridge`` re-exports its public names. It imports only ``bridge.exchange``.
"""
