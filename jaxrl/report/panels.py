"""What figures, summary and page have in common: curves, the metrics that are listed, colors."""

from __future__ import annotations

# Okabe and Ito's palette, readable with any color vision
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
OUTCOME_COLORS = ("#009E73", "#56B4E9", "#D55E00")  # of prompts whose answers are all, some and none right
# Metric and label of each curve.
PANELS = {
    "reward": ("reward/mean", "mean reward (+1 right, -1 wrong)"),
    "entropy": ("policy/entropy", "policy entropy (nats a token)"),
    "length": ("response/length_mean", "response length (tokens)"),
    "clip_fraction": ("update/clip_fraction", "clipped share of tokens"),
    "grad_norm": ("update/grad_norm", "gradient norm"),
}
# Metrics whose means over the first and the last tenth of steps are listed.
SUMMARY = (
    "reward/accuracy",
    "reward/mean",
    "policy/entropy",
    "response/length_mean",
    "response/truncated_fraction",
    "update/grad_norm",
    "update/clip_fraction",
    "sampler/logprob_diff_max",
    "perf/tokens_per_second",
)


def on_dark(color: str) -> str:
    """A color for dark paper: lighter by two fifths of the way to white."""
    parts = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + 0.4 * (255 - part)):02X}" for part in parts)


def colors_of(count: int) -> list[str]:
    """A color for each run or phase; they come again after the last."""
    return [COLORS[i % len(COLORS)] for i in range(count)]
