"""The device half: pure functions of arrays, and the engine's only jax.jit."""
