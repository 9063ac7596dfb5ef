"""The JustRL paper's two tables from the recipes: which system has which technique, and the tokens that it may sample.

python recipes/systems.py     writes both into docs/systems.md
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Set
from pathlib import Path

from jaxrl import config

TECHNIQUES = (
    "entropy control",
    "tuned hyperparameters",
    "training prompt",
    "reference reset",
    "length control",
    "adaptive temperature",
    "rollout rescue",
    "dynamic sampling",
    "stages",
)
E, H, P, R, L, T, O, D, S = TECHNIQUES  # noqa: E741
# sections whose change in a stage is a tuned value, and keys
TUNED = ("optimizer.", "loss.", "advantage.", "kl.", "entropy.", "rollout.prompts", "rollout.samples")


@dataclasses.dataclass(frozen=True)
class System:
    """A row of the paper's tables.

    Attributes:
      recipe: of this project.
      printed: techniques that the paper ticks.
      context: what the paper counts an answer as, in 1,024 tokens, or would, by rollout.max_tokens.
      before: the system whose run it continues.
      budget: tokens that the paper prints, in units of 1,024; 0 where it prints none.
    """

    recipe: str
    printed: Set[str]
    context: dict[int, int]
    before: str = ""
    budget: float = 0.0


K8, K16, K24 = {8192: 8}, {16384: 16}, {24576: 24}
SYSTEMS = {
    "STILL-3": System("still-3-1.5b", {H, P, R}, {29000: 29}),
    "DeepScaleR": System("deepscaler-1.5b", {E, L, S}, K8 | K16 | K24, budget=2.2e6),
    "FastCuRL-V3": System("fastcurl-1.5b-v3", {H, L, S}, K8 | K16 | K24),
    "ProRL v1": System("prorl-1.5b-v1", {E, H, R, L, D, S}, {8096: 8} | K16, budget=2.1e8),
    "e3": System("e3-1.7b", {E, H, L, D, S}, K8 | K16),
    "Polaris": System("polaris-1.7b", {E, H, L, T, O, D, S}, {39936: 40, 48128: 48}),
    "Archer-Math": System("archer-math-1.5b", {E, L, D}, {32768: 32}),
    "ProRL v2": System("prorl-1.5b-v2", {E, H, R, L, D, S}, K8, before="ProRL v1", budget=2.8e8),
    "QuestA": System("questa-nemotron-1.5b", {D, S}, {24000: 32}, budget=2.6e8),
    "BroRL": System("brorl-1.5b", {E, H, R, L, D, S}, K16, before="ProRL v2", budget=6.8e8),
    "JustRL, DeepSeek": System("justrl-deepseek-1.5b", {E}, {15360: 16}, budget=1.4e8),
    "JustRL, Nemotron": System("justrl-nemotron-1.5b", {E}, {15360: 16}, budget=1.1e8),
}
KEPT = 0.5  # of sampled groups under dynamic sampling with refill, as the paper assumes
WHY = {  # a cell is not as printed
    "DeepScaleR": {
        H: "16 answers a problem instead of 8 from the second stage on: its scripts for 16k and 24k",
        R: "each stage is a new program on a checkpoint, with a KL term against its own start",
    },
    "FastCuRL-V3": {
        E: "an entropy bonus of 0.001 in stages 1 to 4, the default of its fork of verl, which only V3 sets to 0",
        R: "stages 1 to 4 are new programs on checkpoints, each with a KL term against its own start",
    },
    "e3": {
        R: "its second stage is a new program on a checkpoint, with a KL term against its own start",
        D: "neither its script nor its trainer has a filter of groups",
    },
    "Polaris": {
        H: "between its stages only temperature, length and data change",
        O: "not in its code; by its authors it was used for the 7B model alone",
    },
    "Archer-Math": {
        L: "its script has the buffer for long answers off, and its paper has none; that of its successor has one of "
        "16 tokens"
    },
    "QuestA": {
        H: "20 times the learning rate, and advantages normalized over the batch",
        P: "the hint is in the prompt",
    },
}


def load(name: str) -> config.Recipe:
    return config.load(SYSTEMS[name].recipe)


@functools.cache
def techniques(name: str) -> frozenset[str]:
    """Techniques of a system by its recipe, those of the runs that it continues included."""
    before = SYSTEMS[name].before
    return of_recipe(load(name)) | (techniques(before) if before else frozenset())


def of_recipe(recipe: config.Recipe) -> frozenset[str]:
    """The paper's techniques that a recipe has; one line each, JustRL's own values being none but entropy control."""
    stages = config.stages_of(recipe)
    parts = [stage.recipe for stage in stages]
    flat = [config.flat(part) for part in parts]
    changed = {key for key in flat[0] if any(one[key] != flat[0][key] for one in flat)}
    tuned = any(key.startswith(TUNED) for key in changed)
    restarts = any("reference" in stage.restart and stage.recipe.kl.coefficient for stage in stages)
    lengths = any(r.length != config.Length() or r.reward.overlong_tokens for r in parts)
    has = {
        E: any(r.loss.clip_high > r.loss.clip_low or r.entropy.bonus or r.entropy.quantile for r in parts),
        H: tuned or any(r.optimizer.learning_rate != 1e-6 for r in parts),
        P: any(not r.data.suffix or r.data.hint_share for r in parts),
        R: restarts or any(r.kl.coefficient and r.kl.reset_every for r in parts),
        L: "rollout.max_tokens" in changed or lengths,
        T: "rollout.temperature" in changed,
        O: any(r.groups.rescue for r in parts),
        D: any(r.groups.filter != "none" for r in parts),
        S: len(stages) > 1,
    }
    return frozenset(name for name, there in has.items() if there)


@dataclasses.dataclass(frozen=True)
class Budget:
    """Tokens that a run may sample, in units of 1,024, those of the runs that it continues included."""

    steps: int  # its own
    updates: int  # its own
    by_formula: float  # the paper's, which counts an answer as a whole context
    prompts_and_answers: float  # by the recipe's limits, with KEPT under refill


def budget(name: str) -> Budget:
    system = SYSTEMS[name]
    before = budget(system.before) if system.before else Budget(0, 0, 0.0, 0.0)
    steps, updates, formula, whole = 0, 0, before.by_formula, before.prompts_and_answers
    for stage in config.stages_of(load(name)):
        r, own = stage.recipe, stage.until - stage.first
        sampled = own / (KEPT if r.groups.filter == "refill" else 1)
        steps, updates = steps + own, updates + own * r.updates_per_step
        formula += sampled * r.rollout.prompts * r.rollout.samples * system.context[r.rollout.max_tokens]
        whole += sampled * r.step_tokens / 1024
    return Budget(steps, updates, formula, whole)


def tables() -> dict[str, str]:
    """The generated parts of docs/systems.md, by name."""
    return {"techniques": _techniques(), "differences": _differences(), "budgets": _budgets()}


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _techniques() -> str:
    lines, odd = [_row(["", *TECHNIQUES]), "|---|" + ":-:|" * len(TECHNIQUES)], differing()
    for name, system in SYSTEMS.items():
        ours, cells = techniques(name), list[str]()
        for one in TECHNIQUES:
            word = "yes" if one in ours else ""
            cells.append(f"**{word or 'no'}**" if (name, one) in odd else word)
        lines.append(_row([f"{name} `{system.recipe}`", *cells]))
    return "\n".join(lines)


def differing() -> list[tuple[str, str]]:
    """(system, technique) of the cells that are not as the paper prints them."""
    return [
        (name, one)
        for name, system in SYSTEMS.items()
        for one in TECHNIQUES
        if (one in techniques(name)) != (one in system.printed)
    ]


def _differences() -> str:
    lines = ["| system | technique | printed | recipe | evidence |", "|---|---|---|---|---|"]
    for name, one in differing():
        words = ("yes", "no") if one in SYSTEMS[name].printed else ("no", "yes")
        lines.append(_row([name, one, *words, WHY[name][one]]))
    return "\n".join(lines)


def _budgets() -> str:
    head = ["", "steps", "updates", "printed", "by its formula", "of JustRL's", "prompts and answers"]
    lines = [_row(head), "|---|" + "--:|" * (len(head) - 1)]
    justrl = budget("JustRL, DeepSeek").by_formula
    for name, system in SYSTEMS.items():
        own = budget(name)
        cells = [f"{own.steps:,}", f"{own.updates:,}", _number(system.budget, 2), _number(own.by_formula, 4)]
        cells += [f"{own.by_formula / justrl:.3f}", _number(own.prompts_and_answers, 4)]
        lines.append(_row([name, *cells]))
    return "\n".join(lines)


def _number(x: float, digits: int) -> str:
    return f"{x:.{digits - 1}e}".replace("e+0", "e") if x else ""


def put_in(page: str) -> str:
    """The page with its generated parts as they are now."""
    for name, table in tables().items():
        mark = f"<!-- {name}: python recipes/systems.py -->"
        before, _, rest = page.partition(mark)
        page = f"{before}{mark}\n\n{table}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


if __name__ == "__main__":
    path = Path(__file__).parents[1] / "docs" / "systems.md"
    path.write_text(put_in(path.read_text(encoding="utf-8")), encoding="utf-8")
