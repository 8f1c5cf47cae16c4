"""Several processes, one engine: every process makes the same calls, and each call's outputs are the same in all.

jaxengine.distributed.initialize()        # before the first array; finds its place in the environment
llm = jaxengine.LLM(model, tensor_parallel_size=4, data_parallel_size=jax.device_count() // 4)
"""

import contextlib
import signal
from collections.abc import Iterator

from jaxengine.base.signals import noted
from sharding.distributed import initialize

__all__ = ["draining", "initialize"]


@contextlib.contextmanager
def draining() -> Iterator[None]:
    """SIGTERM inside the block is heeded after it, with exit code 143: what is under way comes to its end in every
    process. In the main thread.
    """
    with noted(signal.SIGTERM, "SIGTERM: what is under way comes to its end first") as is_told:
        yield
    if is_told():
        raise SystemExit(128 + signal.SIGTERM)
