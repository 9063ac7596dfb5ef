"""Functions that a recipe names as "module:function": a technique of one's own needs no edit of this package."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from jaxrl.errors import InputError, first_line


def is_plugin(name: str) -> bool:
    """Whether a recipe's value names a function of another module."""
    return ":" in name


def load_plugin(key: str, name: str) -> Callable[..., object]:
    """The function that "module:function" names, where `key` has it.

    Raises:
      InputError: if it cannot be imported, or called.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module raises
        raise InputError(
            f'{key} = "{name}": {type(error).__name__}: {first_line(error)}; it is "module:function", and '
            "Python looks for the module where it always does (PYTHONPATH)"
        ) from None
    if not callable(found):
        raise InputError(f'{key} = "{name}" is no function')
    return found
