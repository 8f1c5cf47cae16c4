"""Libraries that only an extra of this package brings, imported when they are first needed."""

import importlib
from typing import Any


def imported(module: str, extra: str) -> Any:
    """The module. Raises ImportError that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}): pip install 'jaxengine[{extra}]'") from error
