"""From marked groups to what `update` takes: packed mini-batches on the devices.

A recipe's techniques are chosen once, as a `Method`: functions over a step's or a mini-batch's sequences, in NumPy.
What they give are arrays of the mini-batch. JustRL's method needs nothing but rewards, so its mini-batches are packed
before any log-probability is known; where a technique looks at those, they are computed first, of every sequence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrl import config
from jaxrl.errors import InputError, first_line
from jaxrl.grpo import packing, verl
from jaxrl.grpo.advantages import relative_advantages, sequence_weights
from jaxrl.grpo.gate import high_entropy
from jaxrl.grpo.kl import kl_penalty
from jaxrl.grpo.mismatch import importance_weights
from jaxrl.grpo.packing import NO_TERMS, Terms
from jaxrl.grpo.update import Likelihoods
from jaxrl.models import decoder
from jaxrl.parallel import processes
from jaxrl.parallel.mesh import to_devices
from jaxrl.plugins import is_plugin, load_plugin
from jaxrl.programs import Programs
from jaxrl.rewards.length import dropped
from jaxrl.types import Center, Groups, Rollout, Values

Tokens = list[Float[np.ndarray, " _"]]  # a number for each token of each sequence's completion


class Known(NamedTuple):
    """Log-probabilities and entropies (nats) of sequences, where a technique needs them on the host."""

    old: Tokens  # of the policy before the step
    entropies: Tokens | None
    reference: Tokens | None


class MiniBatch(NamedTuple):
    """The sequences of one update, [B], as techniques see and change them."""

    rollouts: Sequence[Rollout]
    lengths: Int[np.ndarray, " B"]  # tokens in the loss: of the completion, or 0
    advantages: Values
    weights: Values
    terms: Terms = NO_TERMS
    known: Known | None = None


# Scores a mini-batch under a reference's parameters; see `reference.scorer`.
Scorer = Callable[[packing.PackedBatch], Likelihoods]
Advantages = Callable[
    [Float[np.ndarray, " B"], Int[np.ndarray, " B"], Int[np.ndarray, " B"], Known | None], Values
]
Technique = Callable[[MiniBatch], MiniBatch]


class Method(NamedTuple):
    """A recipe's techniques.

    Attributes:
      advantages: of rewards, each one's group and tokens, and what is known, [B] each.
      techniques: applied to every mini-batch, in order.
      looks: whether one of these needs `Known`.
      exact_ratio: whether the first update's ratio is exactly 1.
    """

    advantages: Advantages
    techniques: tuple[Technique, ...]
    looks: bool
    exact_ratio: bool


def make_method(recipe: config.Recipe) -> Method:
    """Chooses the functions of a recipe's techniques.

    Raises:
      InputError: for a function of the recipe's that cannot be imported.
    """
    kl, entropy = recipe.kl, recipe.entropy
    techniques: list[Technique] = []
    if kl.in_loss:
        techniques.append(functools.partial(_with_kl, kl.coefficient))
    if entropy.bonus:
        techniques.append(functools.partial(_with_bonus, entropy.bonus))
    if entropy.quantile:
        techniques.append(functools.partial(_with_gate, recipe))
    if recipe.sampler.correction != "none":
        techniques.append(functools.partial(_corrected, recipe.sampler))
    return Method(
        _advantages(recipe),
        tuple(techniques),
        looks=recipe.looks,
        exact_ratio=recipe.loss.skip_first_old_logprobs and recipe.optimizer.epochs == 1,
    )


def _advantages(recipe: config.Recipe) -> Advantages:
    section, kl = recipe.advantage, recipe.kl
    own = load_plugin("advantage.center", section.center) if is_plugin(section.center) else None
    center = cast(Center, "none" if own else section.center)

    def advantages(
        rewards: Float[np.ndarray, " B"],
        groups: Int[np.ndarray, " B"],
        lengths: Int[np.ndarray, " B"],
        known: Known | None,
    ) -> Values:
        if own:
            rewards = _checked(section.center, own, rewards, groups, lengths)
        costs = None
        if kl.in_reward:
            assert known and known.reference
            pairs = zip(known.old, known.reference, strict=True)
            costs = [kl.coefficient * kl_penalty(old, reference, kl.estimator) for old, reference in pairs]
        choose = functools.partial(relative_advantages, center=center, scale=section.scale)
        return choose(rewards, groups, lengths, epsilon=section.epsilon, costs=costs)

    return advantages


def _checked(name: str, function: Callable[..., object], *arrays: np.ndarray) -> Float[np.ndarray, " B"]:
    """What a function of the recipe's gives for [B] rewards, their groups and lengths.

    Raises:
      InputError: if it raises, or gives something else than B finite numbers.
    """
    try:
        found = np.asarray(function(*arrays), np.float64)
    except Exception as error:  # whatever it raises
        raise InputError(
            f'advantage.center = "{name}": {type(error).__name__}: {first_line(error)}'
        ) from error
    if found.shape != arrays[0].shape or not np.isfinite(found).all():
        raise InputError(
            f'advantage.center = "{name}" gave {found.dtype} of shape {found.shape}; it has to give '
            f"{len(arrays[0])} finite numbers, one for each reward"
        )
    return found


def _with_kl(coefficient: float, mini: MiniBatch) -> MiniBatch:
    """The divergence from the reference in the loss, averaged as the policy's term is."""
    return mini._replace(terms=mini.terms._replace(kl_weights=_product(mini.weights, coefficient)))


def _with_bonus(coefficient: float, mini: MiniBatch) -> MiniBatch:
    """An entropy bonus, averaged as the policy's term is."""
    return mini._replace(terms=mini.terms._replace(entropy_weights=_product(mini.weights, coefficient)))


def _with_gate(recipe: config.Recipe, mini: MiniBatch) -> MiniBatch:
    """Archer's: bounds of the ratio by a token's entropy, and a KL term for low ones alone, averaged over these."""
    assert mini.known and mini.known.entropies
    loss, wide = recipe.loss, recipe.entropy.clip
    high = high_entropy(mini.known.entropies, recipe.entropy.quantile)
    terms = mini.terms._replace(
        ratio_low=[np.where(h, 1 - wide, 1 - loss.clip_low) for h in high],
        ratio_high=[np.where(h, 1 + wide, 1 + loss.clip_high) for h in high],
    )
    if terms.kl_weights is not None:
        low = np.array([np.sum(~h) for h in high]) * (mini.lengths > 0)
        weights = _weights_of(recipe, low) * recipe.kl.coefficient
        terms = terms._replace(kl_weights=[w * ~h for w, h in zip(weights, high, strict=True)])
    return mini._replace(terms=terms)


def _corrected(section: config.Sampler, mini: MiniBatch) -> MiniBatch:
    """Weights of the policy's term alone, for what a slightly different policy sampled."""
    assert mini.known and section.correction != "none"
    ratios = importance_weights(
        mini.known.old,
        [np.asarray(rollout.logprobs, np.float64) for rollout in mini.rollouts],
        section.correction,
        section.correction_cap,
        section.correction_floor,
        section.correction_level,
    )
    return mini._replace(terms=mini.terms._replace(corrections=ratios))


def _product(values: Values, factors: Bool[np.ndarray, " B"] | float) -> Values:
    if isinstance(values, np.ndarray):
        return values * factors
    return [x * factor for x, factor in zip(values, np.broadcast_to(factors, len(values)), strict=True)]


def _taken(values: Values, chosen: Int[np.ndarray, " B"]) -> Values:
    return values[chosen] if isinstance(values, np.ndarray) else [values[i] for i in chosen]


def minibatches(
    recipe: config.Recipe,
    method: Method,
    programs: Programs,
    groups: Groups,
    learning_rate: float,
    params: decoder.Params,
    reference: Scorer | None = None,
    stale: bool = False,
) -> list[packing.PackedBatch]:
    """The mini-batches of a step, on the devices, with the log-probabilities that their ratios are relative to.

    These are those of the policy before this step's updates, for which the first of them may need no pass; or the
    sampler's, where older parameters sampled. With a correction they are always the former, and importance weights make
    up for the difference to the sampler (decoupled PPO, arXiv 2110.00641).

    Args:
      recipe: how they are divided, weighted and packed.
      method: the recipe's, see `make_method`.
      programs: whose layout and mesh they are for.
      groups: [P][G] marked rollouts; without any there are no mini-batches.
      learning_rate: of the updates.
      params: of the policy.
      reference: of what a KL term is relative to; needed where the recipe has one.
      stale: whether some were sampled by older parameters than the step's.
    """
    rollouts = [rollout for group in groups for rollout in group]
    if not rollouts:
        return []
    of_group = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    lengths = np.array([len(r.tokens) for r in rollouts])
    rule = recipe.length.on_truncated
    out = np.array([dropped(rule, r.finish_reason == "length", r.score > 0) for r in rollouts])
    in_loss = np.where(out, 0, lengths) if rule == "drop" else lengths
    dealt = list(divide(recipe, rollouts, in_loss))
    known, order = list[Known](), np.concatenate([chosen for chosen, _ in dealt])
    if method.looks:
        known = [_known(programs, [rollouts[i] for i in chosen], params, reference) for chosen, _ in dealt]
    rewards = np.array([rollout.reward for rollout in rollouts])
    advantages = method.advantages(rewards, of_group, lengths, _in_order(known, order) if known else None)
    advantages = _product(advantages, ~out)
    found = []
    for k, (chosen, weights) in enumerate(dealt):
        own = [rollouts[i] for i in chosen]
        mini = MiniBatch(own, in_loss[chosen], _taken(advantages, chosen), weights)
        if known:
            mini = mini._replace(known=known[k])
        if known and stale and recipe.sampler.correction == "none":
            mini = mini._replace(known=known[k]._replace(old=[rollout.logprobs for rollout in own]))
        mini = functools.reduce(lambda mini, technique: technique(mini), method.techniques, mini)
        exact = method.exact_ratio and k == 0 and not stale and not method.looks
        found.append(_placed(recipe, programs, mini, learning_rate, params, reference, stale, exact))
    return found


def _placed(
    recipe: config.Recipe,
    programs: Programs,
    mini: MiniBatch,
    learning_rate: float,
    params: decoder.Params,
    reference: Scorer | None,
    stale: bool,
    exact: bool,
) -> packing.PackedBatch:
    """A mini-batch on the devices, with the log-probabilities that are not known on the host."""
    terms, known = mini.terms, mini.known
    if known and terms.kl_weights is not None:
        terms = terms._replace(ref_logprobs=known.reference)
    packed = packing.pack(
        mini.rollouts,
        mini.advantages,
        programs.mesh.size,
        programs.layout,
        learning_rate=learning_rate,
        weights=mini.weights,
        old_logprobs=known and known.old,
        terms=terms,
        on_policy=exact,
        # without advantage, another's surrogate may still have a loss
        skip_zero_advantage=recipe.loss.skip_zero_advantage and not is_plugin(recipe.loss.surrogate),
        sequences=programs.sequences,
    )
    batch = to_devices(packed, programs.mesh)
    if known:
        return batch
    if terms.kl_weights is not None:
        assert reference is not None
        batch = batch.replace(ref_logprobs=reference(batch).logprobs)
    if stale:
        return batch.replace(old_logprobs=batch.sampler_logprobs)
    if exact:
        return batch
    return batch.replace(old_logprobs=likelihoods(programs, params, batch).logprobs)


def likelihoods(programs: Programs, params: decoder.Params, batch: packing.PackedBatch) -> Likelihoods:
    """Log-probabilities of a batch's tokens under these parameters."""
    return programs.logprobs(params, packing.without_terms(batch))


def scored(programs: Programs, params: decoder.Params, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Rollouts with the log-probabilities that these parameters give their tokens, in place of a sampler's."""
    found: list[Rollout] = []
    for first in range(0, len(rollouts), programs.sequences):
        some = rollouts[first : first + programs.sequences]
        known = _known(programs, some, params, None)
        pairs = zip(some, known.old, strict=True)
        found += [dataclasses.replace(each, logprobs=own.astype(np.float32)) for each, own in pairs]
    return found


def _known(
    programs: Programs,
    rollouts: Sequence[Rollout],
    params: decoder.Params,
    reference: Scorer | None,
) -> Known:
    """Log-probabilities of all of these sequences, on the host of every process."""
    lengths = [len(r.prompt.tokens) for r in rollouts], [len(r.tokens) for r in rollouts]
    devices, layout = programs.mesh.size, programs.layout
    placement = packing.lay_out(*lengths, devices, layout, sequences=programs.sequences)
    nothing = np.zeros(len(rollouts))
    # neither this nor what comes back is kept on the host longer than it is read: each may take gigabytes
    batch = to_devices(
        packing.pack(rollouts, nothing, devices, layout, learning_rate=0.0, placement=placement),
        programs.mesh,
    )

    def tokens(streams: jax.Array) -> Tokens:
        return [np.asarray(x, np.float64) for x in packing.unfill(placement, processes.whole(streams))]

    own = likelihoods(programs, params, batch)
    old, entropies = tokens(own.logprobs), None if own.entropies is None else tokens(own.entropies)
    del own
    return Known(old, entropies, None if reference is None else tokens(reference(batch).logprobs))


def _in_order(parts: Sequence[Known], order: Int[np.ndarray, " B"]) -> Known:
    """What is known of mini-batches, by the step's sequences: `order` has the index of each."""

    def joined(of_parts: Sequence[Tokens | None]) -> Tokens | None:
        if of_parts[0] is None:
            return None
        flat = [x for part in of_parts for x in part or ()]
        return [flat[i] for i in np.argsort(order)]

    return Known(*map(joined, zip(*parts, strict=True)))  # type: ignore[arg-type]


def divide(
    recipe: config.Recipe, rollouts: Sequence[Rollout], lengths: Int[np.ndarray, " S"]
) -> Iterator[tuple[Int[np.ndarray, " B"], Float[np.ndarray, " B"]]]:
    """Yields the sequences of each mini-batch, and the weight of each one's tokens in the loss.

    A mini-batch has the rollouts of `minibatch_prompts` prompts in order.

    Args:
      recipe: the run's.
      rollouts: of a step.
      lengths: tokens of each that are in the loss; 0 where it is left out.
    """
    loss, size = recipe.loss, recipe.optimizer.minibatch_prompts * recipe.rollout.samples
    if loss.normalization == "verl_dynamic":
        whole = [len(r.prompt.tokens) + len(r.tokens) for r in rollouts]
        for mini in verl.divide(whole, loss.verl_ranks, recipe.minibatches, loss.verl_tokens):
            chosen, weights = verl.weights(mini, lengths)
            yield chosen, weights * (lengths[chosen] > 0)
        return
    for first in range(0, len(rollouts), size):
        chosen = np.arange(first, min(first + size, len(rollouts)))
        yield chosen, _weights_of(recipe, lengths[chosen])


def _weights_of(recipe: config.Recipe, lengths: Int[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
    """The weight of each sequence's tokens; sequences without tokens in the loss have none, and do not count."""
    live, weights = lengths > 0, np.zeros(len(lengths))
    normalization = "token_mean" if recipe.loss.normalization == "verl_dynamic" else recipe.loss.normalization
    if live.any():
        weights[live] = sequence_weights(lengths[live], normalization, recipe.rollout.max_tokens)
    return weights


def needs_logprobs(recipe: config.Recipe) -> bool:
    """Whether `minibatches` may call `programs.logprobs`."""
    method = make_method(recipe)
    return method.looks or not method.exact_ratio or recipe.minibatches > 1 or bool(recipe.kl.coefficient)
