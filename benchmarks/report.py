"""The report of a long run: seconds to write it, the page's size, seconds until a browser shows the page.

    python -m benchmarks.report [--tokens 200]

makes a run of 4,000 steps with 20,000 stored rollouts. The browser is Chromium with its driver, where they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import write_results
from jaxrl.report.figures import report
from jaxrl.telemetry.rollouts import write_rollouts
from jaxrl.types import Prompt, Rollout

WORDS = [
    *"0123456789=+-.,\n",
    *("so", "the", "sum", "of", "we", "have", "let", "Wait", "therefore", "square", "root"),
]


def make_run(folder: Path, steps: int = 4000, rollouts: int = 20_000, tokens: int = 200) -> None:
    """Random curves in the shape of a long run's, and rollouts of 80 steps, with log-normal lengths."""
    rng = np.random.default_rng(0)
    at = np.linspace(0, 1, steps)
    names = [f"other/{i}" for i in range(12)] + ["update/grad_norm", "update/tokens"]
    metrics = {name: rng.lognormal(size=steps) for name in names}
    metrics |= {
        "reward/mean": -0.6 + at**0.5 + rng.normal(0, 0.05, steps),
        "policy/entropy": 1.2 + 0.2 * np.sin(9 * at) + rng.normal(0, 0.03, steps),
        "response/length_mean": 7000 - 3000 * at**0.3 + rng.normal(0, 150, steps),
    }
    for phase, seconds in {"sample": 200, "update": 70, "publish": 3, "step": 280}.items():
        metrics[f"time/{phase}"] = seconds * rng.lognormal(0, 0.03, steps)
    folder.mkdir(parents=True)
    rows = ({"step": i} | {name: float(v[i]) for name, v in metrics.items()} for i in range(steps))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kept, group = 80, 8
    for n, step in enumerate(range(0, steps, steps // kept)):
        groups = []
        for p in range(-(-rollouts // kept // group)):
            prompt = Prompt(f"{n}-{p}", rng.integers(0, len(WORDS), 40), str(p))
            lengths = np.maximum(rng.lognormal(np.log(tokens) - 0.3, 0.8, group).astype(int), 1)
            groups.append([make_rollout(rng, prompt, length, step) for length in lengths])
        write_rollouts(folder, step, groups, lambda ids: "".join(f" {WORDS[i]}" for i in ids))


def make_rollout(rng: np.random.Generator, prompt: Prompt, length: int, step: int) -> Rollout:
    """Random words, of which two fifths were not certain."""
    tokens = rng.integers(0, len(WORDS), length)
    logprobs = -rng.exponential(0.4, length).astype(np.float32) * (rng.random(length) < 0.4)
    score = float(rng.choice([-1, 1]))
    return Rollout(prompt, tokens, logprobs, "stop", step, score=score, reward=score)


def seconds_to_show(page: Path) -> float | None:
    """Seconds until Chromium has drawn the page; None where it or its driver is missing."""
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(programs):
        return None
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    with webdriver.Chrome(options, webdriver.ChromeService(programs[1])) as browser:
        began = time.monotonic()
        browser.get(page.resolve().as_uri())
        WebDriverWait(browser, 300, 0.05).until(
            lambda b: b.execute_script("return document.documentElement.dataset.ready")
        )
        return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=200, help="mean length of a rollout (default: 200)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "long"
        make_run(run, tokens=args.tokens)
        stored = sum(file.stat().st_size for file in (run / "rollouts").iterdir())
        began = time.monotonic()
        page = report([run])[-1]
        wrote = time.monotonic() - began
        shown = seconds_to_show(page)
        result: dict[str, float | None] = {
            "tokens": args.tokens,
            "rollouts_mb": round(stored / 1e6, 1),
            "page_mb": round(page.stat().st_size / 1e6, 1),
            "report_seconds": round(wrote, 1),
            "shown_seconds": round(shown, 1) if shown else None,
        }
    print(json.dumps(result, indent=2))
    write_results("report", result)


if __name__ == "__main__":
    main()
