"""What passes through the host's memory."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
from jax._src.array import ArrayImpl


def bytes_on_host(call: Callable, *arguments: Any) -> tuple[int, Any]:
    """(bytes of the JAX arrays whose values were asked for on the host, what the call returned)."""
    value, asked = ArrayImpl._value.fget, []

    def watched(x: Any) -> Any:
        asked.append(x.nbytes)
        return value(x)

    with mock.patch.object(ArrayImpl, "_value", property(watched)):
        returned = jax.block_until_ready(call(*arguments))
    return sum(asked), returned
