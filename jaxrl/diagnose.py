"""Where the sampler's log-probabilities of a step are not the trainer's, and which rounding makes them so.

The same tokens are scored again in float32, and then with one rounding more at a time, down to what a bfloat16 server
does. How far each of these is from float32, how near it comes to the sampler, and whether both are off at the same
tokens tell what the difference is made of: roundings that both sides can have in common (those of the weights, say),
others of the same size, or something else.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32

from jaxrl.data.prompts import spread
from jaxrl.models import decoder
from jaxrl.models.attention import Segments, packed_attention
from jaxrl.replay import open_replay
from jaxrl.telemetry import agreement
from jaxrl.types import Rollout, Say

CHUNK = 256  # tokens whose logits exist at one time
AGREES = 1e-4  # nats a token on average, as different orders of float32 sums make it
MOSTLY = 0.5  # of a difference
LIKELY = (0.01, 0.1, 0.5, 0.9, 0.99)  # edges of the probabilities by which tokens are grouped
WORST = 8  # tokens that are listed
# XLA may else leave out a rounding between two operations that it joins
AS_WRITTEN = {"xla_allow_excess_precision": False}


class Arithmetic(NamedTuple):
    """How a policy is computed: dtypes that its weights are rounded to, of the layers, and of the logits."""

    name: str
    weights: str
    layers: str
    logits: str


LADDER = (
    Arithmetic("float32", "float32", "float32", "float32"),
    Arithmetic("weights in bfloat16", "bfloat16", "float32", "float32"),
    Arithmetic("and layers in bfloat16", "bfloat16", "bfloat16", "float32"),
    Arithmetic("and logits in bfloat16", "bfloat16", "bfloat16", "bfloat16"),
)


class Rung(TypedDict):
    """A way to compute the policy, beside the sampler. Differences are means of absolute values, nats a token."""

    name: str
    from_float32: float
    from_sampler: float
    correlation: float | None  # of both differences to float32; None where one of them is none


class Part(TypedDict):
    """The tokens of a kind."""

    name: str
    tokens: int
    mean: float  # of sampler - float32, nats
    mean_abs: float
    p99: float  # of the absolute value
    largest: float


class Layer(TypedDict):
    """A layer's output in bfloat16 beside float32's: root mean squares, relative to float32's."""

    alone: float  # of this layer, from an exact input
    so_far: float  # with all layers before it


class Token(TypedDict):
    """A token of which both sides are far apart."""

    prompt: str
    sample: int
    position: int  # in the answer
    text: str
    sampler: float  # log-prob, nats
    float32: float


class Diagnosis(TypedDict):
    """diagnose/step_NNNNNN.json."""

    step: int  # 1 for the first
    answers: int
    tokens: int
    told: float | None  # the run's own sampler/logprob_diff_mean of the step
    ladder: list[Rung]
    positions: list[Part]
    probabilities: list[Part]
    layers: list[Layer]
    worst: list[Token]
    findings: list[str]


def diagnose(
    run: Path, step: int | None, answers: int, overrides: Sequence[str] = (), say: Say = print
) -> Diagnosis:
    """Compares the log-probabilities that a run has stored with those of its own weights.

    Args:
      run: the run folder.
      step: 1 for the first; None takes the newest with answers and a checkpoint before it.
      answers: how many are looked at, evenly spaced over the step.
      overrides: see `config.load`.
      say: prints a line.

    Raises:
      InputError: if the run has not kept what is needed, or it is damaged or of other data.
    """
    with open_replay(run, overrides, 0.0, say) as replay:
        began = replay.began(step)
        step = began.carry.step + 1
        told = replay.rows[step - 1].get(agreement.METRIC)
        model, temperature = replay.setup.model, began.work.recipe.rollout.temperature
        tokenizer = replay.setup.tokenizer
    named = [(g, rollout) for group in began.groups for g, rollout in enumerate(group)]
    fresh = [(g, rollout) for g, rollout in named if rollout.version == step - 1]
    if stale := len(named) - len(fresh):
        say(f"{stale} of {len(named)} answers are by older weights, and left out")
    chosen = spread(fresh, answers)
    params = jax.device_put(jax.device_get(began.carry.state.params), jax.local_devices()[0])
    rollouts = [rollout for _, rollout in chosen]
    ladder = []
    for arithmetic in LADDER:
        say(f"scoring {len(rollouts)} answers: {arithmetic.name}")
        ladder.append(_scored(model, params, rollouts, temperature, arithmetic))
    sampler = np.concatenate([rollout.logprobs for rollout in rollouts])
    exact = ladder[0]
    off = sampler - exact
    position = np.concatenate([np.arange(len(rollout.tokens)) for rollout in rollouts])
    of = np.concatenate([np.full(len(rollout.tokens), k) for k, rollout in enumerate(rollouts)])
    worst: list[Token] = [
        {
            "prompt": rollouts[of[i]].prompt.id,
            "sample": chosen[of[i]][0],
            "position": int(position[i]),
            "text": tokenizer.decode(rollouts[of[i]].tokens[[position[i]]]),
            "sampler": float(sampler[i]),
            "float32": float(exact[i]),
        }
        for i in np.argsort(-np.abs(off))[:WORST]
    ]
    rungs = [_rung(a.name, logprobs, exact, sampler) for a, logprobs in zip(LADDER, ladder, strict=True)]
    positions, likely = _by_position(position, off), _by_probability(np.exp(exact), off)
    return {
        "step": step,
        "answers": len(rollouts),
        "tokens": len(off),
        "told": told,
        "ladder": rungs,
        "positions": positions,
        "probabilities": likely,
        "layers": _layers(model, params, rollouts),
        "worst": worst,
        "findings": findings(rungs, positions, likely),
    }


def findings(ladder: Sequence[Rung], positions: Sequence[Part], likely: Sequence[Part] = ()) -> list[str]:
    """What the differences are made of, a line each."""
    first, last = ladder[0], ladder[-1]
    total = first["from_sampler"]
    if total < AGREES:
        return [
            f"sampler and trainer agree: {total:.2g} nats a token, as float32 sums in another order differ"
        ]
    near = min(ladder, key=lambda rung: rung["from_sampler"])
    found = []
    if near["from_sampler"] < MOSTLY * total:
        found.append(
            f"{near['name']} explains it: scored so, the difference falls from {total:.2g} to "
            f"{near['from_sampler']:.2g} nats a token"
        )
    elif last["from_float32"] >= MOSTLY * total:
        found.append(
            f"rounding in bfloat16 explains its size: it moves the trainer's own log-probs by "
            f"{last['from_float32']:.2g} nats a token, of {total:.2g}; but the sampler rounds elsewhere, so scoring "
            f"in bfloat16 too does not come nearer than {near['from_sampler']:.2g}"
        )
    else:
        found.append(
            f"rounding in bfloat16 does not explain it: it is worth {last['from_float32']:.2g} nats a token, of "
            f"{total:.2g}; compare weights, temperature and options of the servers with the run's"
        )
    steps = [rung["from_float32"] for rung in ladder]
    grown = [b - a for a, b in itertools.pairwise(steps)]
    if last["from_float32"] >= AGREES:
        most = int(np.argmax(grown))
        found.append(
            f"of the roundings, '{ladder[most + 1]['name'].removeprefix('and ')}' moves log-probs most"
        )
    if len(likely) > 1:
        rare, sure = likely[0], likely[-1]
        found.append(
            f"tokens of probability {rare['name']} are off by {rare['mean_abs']:.2g}, those of {sure['name']} by "
            f"{sure['mean_abs']:.2g}: so the mean depends on how sure the policy is"
        )
    prompt, rest = positions[0], positions[1:]
    if rest:
        later = float(np.average([p["mean_abs"] for p in rest], weights=[p["tokens"] for p in rest]))
        if prompt["mean_abs"] > 3 * later:
            found.append(
                f"an answer's first token, which follows from the prompt alone, is off by {prompt['mean_abs']:.2g}, "
                f"and later ones by {later:.2g}: look at the prompt, its template and tokens"
            )
        if len(rest) > 2 and rest[-1]["mean_abs"] > 3 * rest[0]["mean_abs"]:
            found.append(
                f"it grows along an answer, from {rest[0]['mean_abs']:.2g} to {rest[-1]['mean_abs']:.2g}: look at "
                "positions (RoPE scaling, longest sequence) and at the sampler's cache"
            )
    return found


def _rung(name: str, logprobs: np.ndarray, exact: np.ndarray, sampler: np.ndarray) -> Rung:
    ours, theirs = logprobs - exact, sampler - exact
    both = ours.std() > 0 and theirs.std() > 0
    return {
        "name": name,
        "from_float32": float(np.abs(ours).mean()),
        "from_sampler": float(np.abs(sampler - logprobs).mean()),
        "correlation": float(np.corrcoef(ours, theirs)[0, 1]) if both else None,
    }


def _by_position(position: Int32[np.ndarray, " T"], off: Float[np.ndarray, " T"]) -> list[Part]:
    """By place in the answer: the first token, which needs no other of it, then twice as many each."""
    place = np.where(position == 0, 0, 1 + np.log2(np.maximum(position, 1)).astype(int))
    names = ["first", "second"] + [f"{2**k}-{2 ** (k + 1) - 1}" for k in range(1, int(place.max()))]
    return [_part(name, off[place == k]) for k, name in enumerate(names) if (place == k).any()]


def _by_probability(p: Float[np.ndarray, " T"], off: Float[np.ndarray, " T"]) -> list[Part]:
    place, names = np.digitize(p, LIKELY), [f"{a:g} to {b:g}" for a, b in itertools.pairwise((0, *LIKELY, 1))]
    return [_part(name, off[place == k]) for k, name in enumerate(names) if (place == k).any()]


def _part(name: str, off: Float[np.ndarray, " T"]) -> Part:
    size = np.abs(off)
    return {
        "name": name,
        "tokens": len(off),
        "mean": float(off.mean()),
        "mean_abs": float(size.mean()),
        "p99": float(np.quantile(size, 0.99)),
        "largest": float(size.max()),
    }


def _stream(rollout: Rollout) -> tuple[Int32[np.ndarray, " N"], slice]:
    """Prompt and answer, padded to a power of two so that few programs are compiled; and where the answer is."""
    tokens = np.concatenate([rollout.prompt.tokens, rollout.tokens]).astype(np.int32)
    size = max(CHUNK, 1 << (len(tokens) - 1).bit_length())
    return np.pad(tokens, (0, size - len(tokens))), slice(len(rollout.prompt.tokens), len(tokens))


def _scored(
    model: decoder.Config,
    params: decoder.Params,
    rollouts: Sequence[Rollout],
    temperature: float,
    arithmetic: Arithmetic,
) -> Float32[np.ndarray, " T"]:
    """Log-probabilities of the answers' tokens, one answer after the other."""
    found = []
    for rollout in rollouts:
        tokens, answer = _stream(rollout)
        found.append(np.asarray(_logprobs(model, params, tokens, temperature, arithmetic[1:]))[answer])
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=(0, 4), compiler_options=AS_WRITTEN)
def _logprobs(
    model: decoder.Config,
    params: decoder.Params,
    tokens: Int32[jax.Array, " N"],
    temperature: float,
    dtypes: tuple[str, str, str],
) -> Float32[jax.Array, " N"]:
    """Each token's log-probability given those before it; the first one's is that of the last."""
    weights, layers, logits = dtypes
    rounded = jax.tree.map(functools.partial(_rounded, dtype=weights), params)
    hidden, _ = decoder.forward(
        model, rounded, tokens, jnp.arange(len(tokens)), _attend_in(len(tokens)), dtype=layers
    )
    head = decoder.head(rounded).astype(layers)

    def chunk(part: tuple[jax.Array, jax.Array]) -> Float32[jax.Array, " C"]:
        h, targets = part
        found = jnp.einsum("nd,vd->nv", h, head, preferred_element_type=jnp.float32)
        scaled = _rounded(found, logits) / temperature
        return jnp.take_along_axis(jax.nn.log_softmax(scaled), targets[:, None], axis=1)[:, 0]

    parts = hidden.reshape(-1, CHUNK, hidden.shape[-1]), jnp.roll(tokens, -1).reshape(-1, CHUNK)
    return jnp.roll(jax.lax.map(chunk, parts).reshape(-1), 1)


def _rounded(x: Float32[jax.Array, " ..."], dtype: str) -> Float32[jax.Array, " ..."]:
    """Values of a dtype. XLA leaves out a cast there and back."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def _attend_in(tokens: int) -> Callable[..., tuple[jax.Array, None]]:
    """Attention of one sequence of so many tokens."""
    segments = Segments(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: None) -> tuple[jax.Array, None]:
        return packed_attention(q, k, v, segments, (tokens,), "xla"), None

    return attend


def _layers(model: decoder.Config, params: decoder.Params, rollouts: Sequence[Rollout]) -> list[Layer]:
    """What each layer's rounding in bfloat16 does to its output."""
    total = np.zeros((3, model.layers))
    for rollout in rollouts:
        tokens, answer = _stream(rollout)
        total += np.asarray(_squares(model, params, tokens, jnp.arange(len(tokens)) < answer.stop))
    alone, so_far, exact = total
    pairs = zip(np.sqrt(alone / exact), np.sqrt(so_far / exact), strict=True)
    return [{"alone": float(a), "so_far": float(b)} for a, b in pairs]


@functools.partial(jax.jit, static_argnums=0, compiler_options=AS_WRITTEN)
def _squares(
    model: decoder.Config, params: decoder.Params, tokens: Int32[jax.Array, " N"], real: jax.Array
) -> Float32[jax.Array, "3 L"]:
    """Sums over real tokens of the squares of each layer's error alone, the error so far, and its exact output."""
    positions, attend = jnp.arange(len(tokens)), _attend_in(len(tokens))

    def one(
        h: tuple[jax.Array, jax.Array], w: decoder.Layer
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        exact, rough = (decoder.layer(model, w, x, positions, attend)[0] for x in h)
        alone, _ = decoder.layer(model, w, h[0].astype("bfloat16"), positions, attend)
        parts = jnp.stack([alone - exact, rough - exact, exact])
        return (exact, rough), jnp.sum(jnp.where(real[:, None], parts, 0.0) ** 2, axis=(1, 2))

    embedded = params["embed"][tokens]
    _, found = jax.lax.scan(one, (embedded, embedded.astype("bfloat16")), params["layers"])
    return found.T
