"""recis_hybrid: recommendation models with a sparse half in torch and towers in torch or JAX."""
