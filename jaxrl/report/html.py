"""The report as one HTML page that needs no network: data and the plotting library are compressed into it."""

from __future__ import annotations

import base64
import gzip
import importlib.metadata
import json
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from jaxrl import config
from jaxrl.report.runs import CHECKS, PHASES, Run, budget, check, ends, number, scores, series

STEPS = 64  # at least so many steps' rollouts are taken into the page where not all fit


def render(
    runs: list[Run],
    colors: list[str],
    panels: dict[str, tuple[str, str]],
    summary: Iterable[str],
    megabytes: int,
) -> str:
    """The page.

    Args:
      runs: overlaid in every curve.
      colors: one for each run.
      panels: metric and label of curves by name; entropy, reward and length are shown at once.
      summary: metrics whose first and last means are listed.
      megabytes: of rollout files to take in, of all runs together.
    """
    curves = [
        {
            "name": run.name,
            "color": color,
            "metrics": _columns(run.rows),
            "evaluations": run.evaluations,
            "benchmarks": [{"step": result["step"], "scores": scores(result)} for result in run.benchmarks],
        }
        for run, color in zip(runs, colors, strict=True)
    ]
    rollouts, notes = zip(*(_rollouts(run, megabytes, len(runs)) for run in runs), strict=True)
    checks = [(rule, [check(run, rule) for run in runs]) for rule in CHECKS]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxrl", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        nonce=secrets.token_urlsafe(16),  # scripts without it do not run, whatever a rollout says
        version=importlib.metadata.version("jaxrl"),
        runs=runs,
        colors=colors,
        panels=[panels[name] for name in ("entropy", "reward", "length")],
        phases=PHASES,
        checks=checks,
        warned=[rule.title for rule, results in checks if any(warns for *_, warns in results)],
        summary={
            key: [ends(series(run.rows, key)) for run in runs]
            for key in summary
            if any(row.get(key) is not None for run in runs for row in run.rows)
        },
        benchmarks={
            name: score.get("title", name)
            for run in runs
            for result in run.benchmarks
            for name, score in scores(result).items()
        },
        budgets=[budget(run) for run in runs],
        differences=_differences(runs),
        recipes=[(run.name, config.to_toml(run.recipe)) for run in runs if run.recipe],
        notes=notes,
        number=number,
        plotly=_packed(get_plotlyjs()),
        curves=_packed(json.dumps(curves)),
        rollouts=_packed(json.dumps(rollouts, ensure_ascii=False)),
    )


def _packed(text: str) -> Markup:
    """Text for the page's script to unpack; base64 has no character that HTML gives a meaning."""
    return Markup(base64.b64encode(gzip.compress(text.encode(), 6)).decode())


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Values by metric, to five digits."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {
        key: [None if row.get(key) is None else float(f"{row[key]:.5g}") for row in rows]
        if key != "step"
        else [row["step"] + 1 for row in rows]
        for key in keys
    }


def _differences(runs: list[Run]) -> list[tuple[str, Any, list[Any]]]:
    """(key, JustRL's value, each run's value) where a run departs from the default recipe."""
    default = config.to_dict(config.Recipe())
    recipes = [config.to_dict(run.recipe or config.Recipe()) for run in runs]
    return [
        (f"{section}.{key}", value, [recipe[section][key] for recipe in recipes])
        for section, keys in default.items()
        for key, value in keys.items()
        if any(recipe[section][key] != value for recipe in recipes)
    ]


def _rollouts(run: Run, megabytes: int, runs: int) -> tuple[dict[str, Any], str]:
    """The stored rollouts, or the first of steps evenly spaced, up to the run's share of bytes; and which in words."""
    limit = megabytes * 10**6 // runs
    files = sorted((run.directory / "rollouts").glob("step_*.jsonl"))
    if not files:
        return {"prompts": [], "rows": []}, "no stored rollouts"
    size = sum(file.stat().st_size for file in files)
    count = min(len(files), max(STEPS, limit * len(files) // size))
    chosen = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, count).round().astype(int))]
    path = run.directory / "rollouts" / "vocabulary.json"
    vocabulary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    prompts: dict[tuple[str, ...], int] = {}
    rows = []
    for file in chosen:
        for row in _first(file, limit // len(chosen)):
            prompt = prompts.setdefault((row["prompt_id"], row["prompt"], row["answer"]), len(prompts))
            texts = [vocabulary.get(str(i)) for i in row["token_ids"]]
            rows.append(
                [
                    row["step"] + 1,
                    prompt,
                    row["sample"],
                    row["score"],
                    int(row["finish_reason"] == "length"),
                    row["version"],
                    row["tokens"],
                    row["logprob_mean"],
                    row["completion"],
                    "" if None in texts else _letters(spans(row["completion"], texts)),  # type: ignore[arg-type]
                    _letters(min(round(-100 * x), 2000) for x in row["logprobs"]),
                    row.get("reward", row["score"]),  # without one in older files
                ]
            )
    note = f"{len(rows):,} rollouts of {len(chosen):,} steps"
    if size > limit:
        note += (
            f", of {len(files):,} steps stored: steps evenly spaced, of each the first {limit / len(chosen) / 1e6:.2g}"
            f" of {size / len(files) / 1e6:.2g} MB; --rollouts {-(-size * runs // 10**6)} takes in all"
        )
    if not vocabulary:
        note += "; tokens are not shaded, since the run has no rollouts/vocabulary.json"
    return {"prompts": list(prompts), "rows": rows}, note


def _first(file: Path, size: int) -> Iterator[dict[str, Any]]:
    """The first rollouts of a file, one at least, in `size` bytes or a rollout more."""
    with file.open("rb") as lines:
        for line in lines:
            yield json.loads(line)
            size -= len(line)
            if size <= 0:
                return


def spans(text: str, pieces: list[str]) -> list[int]:
    """How much of a completion each of its tokens is; the lengths add up to all of it.

    A token decoded alone may differ from its part of the whole: half a character, or a space that a decoder drops. What
    no token claims goes to the next one that is found.
    """
    lengths, at = [], 0
    for piece in pieces:
        found = text.find(piece, at, at + len(piece) + 8)
        end = at if found < 0 else found + len(piece)
        lengths.append(end - at)
        at = end
    if lengths:
        lengths[-1] += len(text) - at
    return lengths


def _letters(numbers: Iterable[int]) -> str:
    """A character a number, from the space on: a tenth of the memory and half the bytes of JSON's numbers."""
    return "".join(chr(32 + min(n, 50_000)) for n in numbers)
