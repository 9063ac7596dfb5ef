"""Packages whose names are imported when they are first used, so that a command line is there at once (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping


def names(package: str, where: Mapping[str, str]) -> Callable[[str], object]:
    """A package's `__getattr__`.

    Args:
      package: its name.
      where: of each public name, "module" in the package, or "module:name" where it is called otherwise there.
    """

    def find(name: str) -> object:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, there = where[name].partition(":")
        value = getattr(importlib.import_module(f"{package}.{module}"), there or name)
        setattr(sys.modules[package], name, value)  # the next access does not come here
        return value

    return find
