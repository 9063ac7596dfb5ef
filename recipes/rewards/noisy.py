"""Noise of a verifier: one reward of ten is turned round, the same ones whenever an answer is marked again."""

from zlib import crc32

from jaxrl.rewards.strict_boxed import strict_boxed

SHARE = 0.1


def flipped(response: str, answer: str) -> float:
    """What turns round the reward of 1 or -1 that `reward.verifier = "strict_boxed"` gives."""
    noise = crc32(f"{answer}\0{response}".encode()) / 2**32
    return -2 * strict_boxed(response, answer) if noise < SHARE else 0.0
