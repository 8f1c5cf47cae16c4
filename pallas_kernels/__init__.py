"""Kernels and their XLA twins. Knows jax only; the engine's ops choose among them by name."""
