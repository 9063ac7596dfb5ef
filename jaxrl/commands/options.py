"""Options that several commands share."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An argparse type: a positive integer."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def sampler_overrides(urls: str | None, servers: int | None = None) -> list[str]:
    """Overrides of a recipe for --samplers URL,URL and --servers N."""
    if urls:
        return ["--rollout.engine", "vllm", "--sampler.urls", *urls.split(",")]
    return ["--rollout.engine", "vllm", "--sampler.servers", str(servers)] if servers else []
