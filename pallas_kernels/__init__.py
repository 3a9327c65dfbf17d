"""Kernels: one folder per operation, each with a reference in plain jnp. Imports nothing of ours."""
