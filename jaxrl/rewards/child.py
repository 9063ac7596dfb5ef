"""Plain children that keep grading out of the run's own process: how they start, and what they do first."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import BinaryIO


def command(module: str, *arguments: object) -> list[str]:
    """Starts a child that calls `serve` of a module of this package with these arguments, of which `repr` is code."""
    given = ", ".join(map(repr, arguments))
    return [sys.executable, "-P", "-c", f"from jaxrl.rewards.{module} import serve; serve({given})"]


def environment(**more: str) -> dict[str, str]:
    """Of a child: it imports this package from where it is, whatever folder it starts in."""
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)} | more


def open_replies() -> BinaryIO:
    """In a child: its standard output as a pipe for replies; what is printed goes to its standard error instead."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def limit(which: int, value: int) -> None:
    """In a child: lowers one of its resource limits, such as `resource.RLIMIT_AS`."""
    resource.setrlimit(which, (value, resource.getrlimit(which)[1]))
