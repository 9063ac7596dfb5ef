"""A diagnosis of sampler and trainer for people: text and a figure."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from jaxrl.diagnose import Diagnosis, Part
from jaxrl.files import write_atomically
from jaxrl.report import figures
from jaxrl.report.panels import COLORS

OURS, THEIRS = COLORS[:2]


def text(found: Diagnosis) -> str:
    """The findings, and the tables that they follow from."""
    told = "" if found["told"] is None else f"; the run itself said {found['told']:.2g} in its own dtype"
    lines = [f"step {found['step']}: {found['answers']} answers, {found['tokens']} tokens{told}", ""]
    lines += [f"- {line}" for line in found["findings"]]
    lines += ["", f"{'scored in':<26}{'from float32':>14}{'from sampler':>14}{'correlation':>13}"]
    for rung in found["ladder"]:
        both = "" if rung["correlation"] is None else f"{rung['correlation']:.2f}"
        lines.append(
            f"{rung['name']:<26}{rung['from_float32']:>14.2g}{rung['from_sampler']:>14.2g}{both:>13}"
        )
    for title, parts in (
        ("place in the answer", found["positions"]),
        ("probability", found["probabilities"]),
    ):
        lines += [
            "",
            f"{title:<26}{'tokens':>9}{'mean':>12}{'mean size':>12}{'99 of 100':>12}{'largest':>12}",
        ]
        lines += [
            f"{p['name']:<26}{p['tokens']:>9}{p['mean']:>12.2g}{p['mean_abs']:>12.2g}{p['p99']:>12.2g}"
            f"{p['largest']:>12.2g}"
            for p in parts
        ]
    lines += ["", "tokens that are furthest apart:"]
    lines += [
        f"  prompt {t['prompt']}, sample {t['sample']}, token {t['position']} {t['text']!r}: "
        f"{t['sampler']:.4g} by the sampler, {t['float32']:.4g} in float32"
        for t in found["worst"]
    ]
    return "\n".join(lines)


def write(found: Diagnosis, folder: Path) -> list[Path]:
    """Writes step_NNNNNN.png and .json; returns the paths."""
    path = folder / f"step_{found['step'] - 1:06d}"
    write_atomically(path.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    draws = [functools.partial(draw, found=found) for draw in (_ladder, _layers, _positions, _likely)]
    return [figures.save(path.with_suffix(".png"), draws, (12, 8), columns=2), path.with_suffix(".json")]


def _ladder(axes: Axes, found: Diagnosis) -> None:
    places, rungs = np.arange(len(found["ladder"])), found["ladder"]
    axes.barh(places - 0.2, [r["from_sampler"] for r in rungs], 0.4, color=THEIRS, label="from the sampler")
    axes.barh(places + 0.2, [r["from_float32"] for r in rungs], 0.4, color=OURS, label="from float32")
    axes.set_yticks(places, [r["name"] for r in rungs])
    axes.invert_yaxis()
    axes.set_xlabel("mean difference of log-probs, nats a token")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def _layers(axes: Axes, found: Diagnosis) -> None:
    at = np.arange(1, len(found["layers"]) + 1)
    axes.plot(at, [x["so_far"] for x in found["layers"]], color=THEIRS, label="with all layers before it")
    axes.plot(at, [x["alone"] for x in found["layers"]], color=OURS, label="of this layer alone")
    axes.set_xlabel("layer")
    axes.set_ylabel("bfloat16's error, relative")
    axes.set_ylim(0)
    axes.legend(frameon=False)


def _positions(axes: Axes, found: Diagnosis) -> None:
    _parts(axes, found["positions"])
    axes.set_xlabel("place in the answer, tokens")


def _likely(axes: Axes, found: Diagnosis) -> None:
    _parts(axes, found["probabilities"])
    axes.set_xlabel("probability of the token")


def _parts(axes: Axes, parts: Sequence[Part]) -> None:
    places = np.arange(len(parts))
    axes.plot(places, [p["mean_abs"] for p in parts], "o-", color=THEIRS, label="mean size")
    axes.plot(places, [p["p99"] for p in parts], "o:", color=THEIRS, label="99 of 100 are below")
    axes.plot(places, [p["mean"] for p in parts], "o-", color=OURS, label="mean, sampler less float32")
    axes.set_xticks(places, [p["name"] for p in parts], rotation=30)
    axes.set_ylabel("difference, nats")
    axes.legend(frameon=False)
