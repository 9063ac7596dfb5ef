"""Checks annotated shapes and dtypes of arrays while tests run: a type checker for jaxtyping's import hook."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from beartype import beartype

F = TypeVar("F", bound=Callable[..., object])
ARRAY = re.compile(r"\b(Bool|Float|Float32|Int|Int32|UInt8|Shaped)\[")


def check(function: F) -> F:
    """Checks a function's array arguments and result. Fields are not checked: pytrees hold anything on the way.

    Args:
      function: made by jaxtyping, with the annotations of the one that is checked.
    """
    if function.__name__ == "__init__":
        return function
    annotations = function.__annotations__.items()
    function.__annotations__ = {name: kind for name, kind in annotations if ARRAY.search(str(kind))}
    return beartype(function)
