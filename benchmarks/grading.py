"""Time of grading the responses of nine benchmarks: `python -m benchmarks.grading`.

12,184 responses, as many as JustRL's protocol samples for one model, with distinct answers: right as they stand,
right once worked out, wrong, and, one in 200, made to keep a computer algebra system busy for ever or nearly.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from benchmarks.harness import write_results
from evals.grade import grade_many
from jaxrl.rewards import sandbox
from jaxrl.types import JsonObject

RESPONSES = 12_184
CHARACTERS = 15_000
WORKERS = (1, 2)
ANSWERS = (  # and the ground truth of each
    ("{a}", "{a}"),
    ("{a}", "{b}"),
    ("{a}.0", "{a}"),
    (r"\dfrac{{{a}}}{{{b}}}", r"\frac{{{a}}}{{{b}}}"),
    (r"\frac{{{a}}}{{{b}}}", "{a}/{b}+0"),
    (r"{a}\sqrt{{{b}}}", r"\sqrt{{{b}}}\cdot{a}"),
    (r"{a}\sqrt{{{b}}}", r"{b}\sqrt{{{a}}}"),
    ("{a}x^2+{b}x", "x({a}x+{b})"),
    ("{a}x^2+{b}x", "{b}x^2+{a}x"),
    (r"\left({a}, {b}\pi\right)", r"({a},{b}\pi)"),
    ("({a}, {b})", "({b}, {a})"),
    (r"{a}\text{{ cm}}", "{a}"),
    ("{a}.{b}", "{b}.{a}"),
)
HOPELESS = (  # one in 200
    ("9**9**{a}", "{b}+x"),
    ("(((1+1/10**15)**300)**300)**300+{a}", "{a}.{b}"),
    (r"\sqrt[" * 12 + "{a}" + "]" * 12, "{b}"),
    ("(x+{a})**{b}!", "x"),
    ("0*(((1+1/10**15)**300)**300)**300+x+{a}", "x+{a}"),
    ("((x+y+1)**60+{a})*(x-y)", "(x-y)*{a}+(x-y)*(x+y+1)**60"),
)


def main() -> None:
    results = [measure(workers) for workers in WORKERS]
    print(f"{RESPONSES:,} responses of {CHARACTERS:,} characters, {results[0]['hopeless']} of them hopeless")
    print(f"{'processes':<12}{'seconds':>10}{'ms each':>10}{'right':>8}{'undecided':>11}")
    for row in results:
        each = row["seconds"] / RESPONSES * 1e3
        print(
            f"{row['processes']:<12}{row['seconds']:>10.1f}{each:>10.2f}{row['right']:>8,}{row['undecided']:>11}"
        )
    setting = {"responses": RESPONSES, "characters": CHARACTERS}
    write_results("grading", setting | {"results": results})


def measure(workers: int) -> JsonObject:
    sandbox.forget()
    start = time.perf_counter()
    marks = grade_many(pairs(random.Random(0)), workers=workers)
    seconds = round(time.perf_counter() - start, 2)
    counts = {"right": marks.count(True), "undecided": marks.count(None), "hopeless": len(marks) // 200 + 1}
    return {"processes": workers, "seconds": seconds} | counts


def pairs(rng: random.Random) -> Iterator[tuple[str, str]]:
    text = "so $x^2 = \\frac{1}{2}$, let me check. " * (CHARACTERS // 38)
    for i in range(RESPONSES):
        answer, truth = rng.choice(ANSWERS if i % 200 else HOPELESS)
        a, b = rng.sample(range(2, 10_000), 2)
        yield f"{text}\\boxed{{{answer.format(a=a, b=b)}}}", truth.format(a=a, b=b)


if __name__ == "__main__":
    main()
