"""Values by a kernel, gradients by XLA."""

import functools
from collections.abc import Callable

import jax


def differentiated_as(plain: Callable, static: int) -> Callable:
    """A kernel's value with the gradient of an expression.

    The first `static` arguments are no arrays. `plain` takes those, then the cotangent, of which it looks at shapes
    alone (how many partial sums there are may follow from the number of rows), then the arrays.
    """

    def wrap(kernel: Callable) -> Callable:
        op = jax.custom_vjp(kernel, nondiff_argnums=tuple(range(static)))

        def backward(*given):
            how, (arrays, cotangent) = given[:static], given[static:]
            _, pullback = jax.vjp(functools.partial(plain, *how, cotangent), *arrays)
            return pullback(cotangent)

        op.defvjp(lambda *given: (op(*given), given[static:]), backward)
        return op

    return wrap
