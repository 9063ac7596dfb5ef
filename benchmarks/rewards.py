"""Time of scoring one training batch with each verifier: `python -m benchmarks.rewards`.

2,048 responses of 60,000 characters (about 16k tokens), half of them right. Responses are scored as they are sampled,
which has to take little beside the minutes of a step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from benchmarks.harness import write_results
from jaxrl.rewards import VERIFIERS, sandbox
from jaxrl.types import JsonObject

RESPONSES = 2048
CHARACTERS = 60_000
REPEATS = 5
Verify = Callable[[str, str], float]
WORDS = ("so", "let me check", "$x^2$", "=", r"\frac{1}{2}", r"\boxed{7}", "Answer: 7", "a sum of 12 cm")


def main() -> None:
    responses, answers = batch(random.Random(0))
    results = [measure(name, verifier, responses, answers) for name, verifier in VERIFIERS.items()]
    print(f"{RESPONSES:,} responses of {CHARACTERS:,} characters, best of {REPEATS}")
    print(f"{'verifier':<14}{'seconds':>10}{'us each':>10}{'accuracy':>10}")
    for row in results:
        each = row["seconds"] / RESPONSES * 1e6
        print(f"{row['verifier']:<14}{row['seconds']:>10.4f}{each:>10.1f}{row['accuracy']:>10.2f}")
    setting = {"responses": RESPONSES, "characters": CHARACTERS, "repeats": REPEATS}
    write_results("rewards", setting | {"results": results})


def batch(rng: random.Random) -> tuple[list[str], list[str]]:
    """Distinct responses that end in an answer in both formats; every second one is wrong."""
    text = " ".join(rng.choices(WORDS, k=CHARACTERS))[:CHARACTERS]
    responses, answers = [], []
    for i in range(RESPONSES):
        start, answer = rng.randrange(CHARACTERS), rng.randrange(10_000)
        head, tail = "<think>", f".\n</think>\nAnswer: {answer}\nThat is $\\boxed{{{answer}}}$."
        responses.append(head + (text[start:] + text[:start])[: -len(head + tail)] + tail)
        answers.append(str(answer + i % 2))
    return responses, answers


def measure(name: str, verifier: Verify, responses: list[str], answers: list[str]) -> JsonObject:
    seconds, scores = list[float](), list[float]()
    for _ in range(REPEATS):
        sandbox.forget()
        start = time.perf_counter()
        scores = [verifier(*pair) for pair in zip(responses, answers, strict=True)]
        seconds.append(time.perf_counter() - start)
    return {"verifier": name, "seconds": round(min(seconds), 5), "accuracy": scores.count(1.0) / len(scores)}


if __name__ == "__main__":
    main()
