"""Several processes, one engine: every process makes the same calls, and each call's outputs are the same in all.

jaxengine.distributed.initialize()        # before the first array; finds its place in the environment
llm = jaxengine.LLM(model, tensor_parallel_size=jax.device_count())
"""

from sharding.distributed import draining, initialize

__all__ = ["draining", "initialize"]
