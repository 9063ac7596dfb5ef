"""The report as one HTML page that needs no network: data and the plotting library are compressed into it."""

from __future__ import annotations

import base64
import gzip
import importlib.metadata
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import jinja2
import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from jaxrl import config
from jaxrl.report.headline import compared, departures, facts, headline, matters, short
from jaxrl.report.panels import PANELS, SUMMARY, colors_of, on_dark
from jaxrl.report.problems import around, histories, lists
from jaxrl.report.runs import (
    CHECKS,
    Check,
    Finding,
    Run,
    accuracies,
    budget,
    ends,
    number,
    prompt_counts,
    series,
    switches,
)
from jaxrl.telemetry.rollouts import RolloutRow, read_rollouts, read_vocabulary, rollout_files
from jaxrl.telemetry.timer import PHASES
from jaxrl.telemetry.trackers import MetricsRow

STEPS = 64  # at least so many steps' rollouts are taken into the page where not all fit
Checked = tuple[Check, list[Finding]]  # a finding of each run
OTHER = "#999"  # color of the time that is no phase's
REACH = 8  # characters within which a token's text is looked for
HIGHEST_COST = 2000  # hundredths of a nat; the page's shade is darkest at 400
HIGHEST_LETTER = 50_000  # under the surrogates, which UTF-8 does not encode


class PageRollouts(TypedDict):
    """A run's rollouts in the page: (id, prompt, answer) once each, and the cells of `_cells`."""

    prompts: list[tuple[str, str, str]]
    around: tuple[str, str]  # see `problems.around`
    histories: dict[int, list[tuple[int, int, int]]]  # see `problems.histories`
    rows: list[list[float | str]]


def render(runs: list[Run], megabytes: int, image: bytes) -> str:
    """The page.

    Args:
      runs: overlaid in every curve.
      megabytes: of rollout files to take in, of all runs together.
      image: summary.png, to be saved from the page.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxrl.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    rollouts, notes = zip(*(_rollouts(run, megabytes, len(runs)) for run in runs), strict=True)
    checks = [(rule, [rule.apply(run) for run in runs]) for rule in CHECKS]
    return environment.get_template("report.html.j2").render(
        nonce=secrets.token_urlsafe(16),  # scripts without it do not run, whatever a rollout contains
        version=importlib.metadata.version("jaxrl"),
        runs=runs,
        colors=[(color, on_dark(color)) for color in colors_of(len(runs))],
        panels=_panels(checks),
        phases=PHASES,
        phase_colors=[*colors_of(len(PHASES)), OTHER],
        checks=checks,
        summary=_summary(runs),
        benchmarks=_titles(runs),
        budget=_budget(runs),
        prompt_counts=[prompt_counts(run) for run in runs],
        problems=[lists(run, of_run["prompts"]) for run, of_run in zip(runs, rollouts, strict=True)],
        headlines=[(headline(run), facts(run)) for run in runs],
        image=base64.b64encode(image).decode(),
        departures=departures(runs),
        matters=matters,
        compared=compared(runs),
        short=short,
        recipes=[(run.name, config.to_toml(run.recipe)) for run in runs if run.recipe],
        notes=notes,
        number=number,
        plotly=_packed(get_plotlyjs()),
        curves=_packed(json.dumps(_curves(runs))),
        rollouts=_packed(json.dumps(rollouts, ensure_ascii=False)),
    )


def spans(text: str, pieces: Iterable[str]) -> list[int]:
    """The length of each token's part of a completion; the lengths add up to all of it.

    A token decoded alone may differ from its part of the whole: half a character, or a space that a decoder drops.
    Characters that no token claims go to the next one that is found.
    """
    lengths, at = [], 0
    for piece in pieces:
        found = text.find(piece, at, at + len(piece) + REACH)
        end = at if found < 0 else found + len(piece)
        lengths.append(end - at)
        at = end
    if lengths:
        lengths[-1] += len(text) - at
    return lengths


def _packed(text: str) -> Markup:
    """Text for the page's script to unpack; base64 has no character that HTML gives a meaning."""
    return Markup(base64.b64encode(gzip.compress(text.encode(), 6)).decode())


def _curves(runs: list[Run]) -> list[dict[str, object]]:
    """The data of the page's charts, an object a run."""
    return [
        {
            "name": run.name,
            "light": color,
            "dark": on_dark(color),
            "switches": [[stage.first + 0.5, stage.name] for stage in switches(run)],
            "metrics": _columns(run.rows),
            "evaluations": run.evaluations,
            "benchmarks": [{"step": r["step"], "scores": accuracies(r)} for r in run.benchmarks],
        }
        for run, color in zip(runs, colors_of(len(runs)), strict=True)
    ]


def _columns(rows: list[MetricsRow]) -> dict[str, list[float | None]]:
    """Values by metric, to five digits, and the steps from 1 on."""
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [_rounded(row.get(key)) for row in rows] for key in keys}
    return columns | {"step": [int(step) + 1 for step in series(rows, "step")]}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _summary(runs: list[Run]) -> dict[str, list[tuple[float, float]]]:
    """First and last mean of each run, of the metrics that one of them has."""
    measured = {key for run in runs for row in run.rows for key, value in row.items() if value is not None}
    return {key: [ends(series(run.rows, key)) for run in runs] for key in SUMMARY if key in measured}


def _panels(checks: list[Checked]) -> list[tuple[str, str, list[Checked]]]:
    """(metrics, label, checks that warn) of each curve: the paper's three, and one for each other check that warns."""
    warned = {
        " + ".join(rule.keys): (rule, of) for rule, of in checks if any(finding.warns for finding in of)
    }
    labels = dict(PANELS[name] for name in ("entropy", "reward", "length"))
    labels |= {key: rule.title for key, (rule, _) in warned.items() if key not in labels}
    return [(key, label, [warned[key]] if key in warned else []) for key, label in labels.items()]


def _budget(runs: list[Run]) -> dict[str, list[str]]:
    """What each run used, by name; device seconds stand beside the seconds, where they are others."""
    used = [budget(run) for run in runs]
    names = dict.fromkeys(name for each in used for name in each if not name.startswith("device seconds"))
    return {name: [_spent(each, name) for each in used] for name in names}


def _spent(used: dict[str, float], name: str) -> str:
    spent = used.get(name, np.nan)
    of_devices = used.get(f"device {name}", spent)
    beside = name.startswith("seconds") and of_devices > spent
    return number(spent) + (f" ({number(of_devices)} device seconds)" if beside else "")


def _titles(runs: list[Run]) -> dict[str, str]:
    """The title of each benchmark by name."""
    found = (accuracies(result) for run in runs for result in run.benchmarks)
    return {name: accuracy["title"] for by_name in found for name, accuracy in by_name.items()}


def _rollouts(run: Run, megabytes: int, runs: int) -> tuple[PageRollouts, str]:
    """The run's rollouts, all of them or as many as its share of bytes allows, and a note that says which."""
    files, vocabulary = rollout_files(run.directory), read_vocabulary(run.directory)
    if not files:
        return {"prompts": [], "around": ("", ""), "histories": {}, "rows": []}, "no stored rollouts"
    limit = megabytes * 10**6 // runs
    size = sum(file.stat().st_size for file in files)
    chosen = _evenly(files, max(STEPS, limit * len(files) // max(1, size)))
    prompts: dict[tuple[str, str, str], int] = {}
    rows, damaged = [], 0
    for file in chosen:
        for row in read_rollouts(file, limit // len(chosen)):
            if row is None:
                damaged += 1
                continue
            prompt = prompts.setdefault((row["prompt_id"], row["prompt"], row["answer"]), len(prompts))
            rows.append(_cells(row, prompt, vocabulary))
    note = f"{len(rows):,} rollouts of {len(chosen):,} steps"
    if size > limit:
        taken, stored = limit / len(chosen) / 1e6, size / len(files) / 1e6  # megabytes a step
        note += (
            f", of {len(files):,} steps stored: steps evenly spaced, of each the first {taken:.2g} of {stored:.2g} MB; "
            f"--rollouts {-(-size * runs // 10**6)} takes in all"
        )
    if damaged:
        note += f"; {damaged:,} damaged lines or files are left out"
    steps = histories(run.history, list(prompts))
    if rows and not steps and len({(row[0], row[1]) for row in rows}) == len(prompts):
        note += "; each problem in one step: those with right and wrong answers come first"
    if not vocabulary:
        note += "; tokens are not shaded, since the run has no rollouts/vocabulary.json"
    found: PageRollouts = {
        "prompts": list(prompts),
        "around": around([prompt for _, prompt, _ in prompts]),
        "histories": steps,
        "rows": rows,
    }
    return found, note


def _evenly(files: Sequence[Path], count: int) -> list[Path]:
    """At most `count` files, evenly spaced, with the first and the last."""
    at = np.linspace(0, len(files) - 1, min(len(files), count)).round().astype(int)
    return [files[i] for i in np.unique(at)]


def _cells(row: RolloutRow, prompt: int, vocabulary: Mapping[str, str]) -> list[float | str]:
    """A rollout as the page's script takes it, in its order."""
    pieces = [text for i in row["token_ids"] if (text := vocabulary.get(str(i))) is not None]
    known = len(pieces) == len(row["token_ids"])
    return [
        row["step"] + 1,
        prompt,
        row["sample"],
        row["score"],
        int(row["finish_reason"] == "length"),
        row["version"],
        row["tokens"],
        round(row["logprob_mean"], 4),
        row["completion"],
        _letters(spans(row["completion"], pieces)) if known else "",
        _letters(min(round(-100 * x), HIGHEST_COST) for x in row["logprobs"]),
        row.get("reward", row["score"]),  # without one in older files
    ]


def _letters(numbers: Iterable[int]) -> str:
    """A character a number, from the space on: a tenth of the memory and half the bytes of JSON's numbers."""
    return "".join(chr(32 + min(n, HIGHEST_LETTER)) for n in numbers)
