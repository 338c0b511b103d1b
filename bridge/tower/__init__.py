"""JAX functions as torch modules: compiled programs, autograd, parameters, adapters for JAX frameworks.

``recis_hybrid.bridge`` re-exports its public names; it imports ``bridge.exchange`` only.
"""
