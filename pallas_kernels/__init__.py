"""Kernels: one folder per operation, each with a reference in plain jnp. Imports nothing of ours.

`compat` holds the Pallas names that move between releases of jax; `dispatch` decides which form of an operation runs.
"""
