"""RoPE settings in the words of config.json: linear, llama3 and YaRN scalings, and the frequencies they give.

As transformers computes them (modeling_rope_utils.py), in float32 from the same roundings. Nothing here imports JAX:
vLLM's processes compare their model's settings with the trainer's by it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from jaxrl.errors import InputError
from jaxrl.json_fields import Fields, shown
from jaxrl.types import JsonObject

if TYPE_CHECKING:
    from jaxtyping import Float32

Kind = Literal["linear", "llama3", "yarn"]
DEFAULT_THETA = 10_000.0  # transformers'


@dataclass(frozen=True)
class RopeScaling:
    """Frequencies for sequences that are longer than the model was pretrained for.

    Sources: linear, kaiokendev and arXiv 2306.15595; llama3, Llama 3.1's reference code; yarn, arXiv 2309.00071.
    """

    kind: Kind
    factor: float  # by which low frequencies are divided
    original: int = 0  # positions of the pretraining; llama3 and yarn
    low: float = 0.0  # llama3: a frequency with fewer turns than this in `original` is divided
    high: float = 0.0  # llama3: one with more stays as it is
    beta_fast: float = 0.0  # yarn: a dimension with more turns in `original` stays as it is
    beta_slow: float = 0.0  # yarn: one with fewer is divided
    truncate: bool = True  # yarn: the bounds between dimensions are whole numbers
    attention_factor: float = 1.0  # yarn: of cosines and sines

    def frequencies(self, theta: float, head_dim: int) -> Float32[np.ndarray, " half"]:
        """Radians a position, of each pair of dimensions."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        periods = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
        plain = np.float32(1) / periods
        if self.kind == "linear":
            return plain / np.float32(self.factor)
        return self._llama3(plain) if self.kind == "llama3" else self._yarn(periods, theta)

    def positions(self, stated: int) -> int:
        """Tokens of the longest sequence, where config.json states this many.

        A llama3 model states what it reaches after scaling. A YaRN model may state either, and a linear one states
        what it was pretrained for, as vLLM reads it.
        """
        reached = {"linear": stated, "llama3": 0, "yarn": self.original}[self.kind]
        return max(stated, int(self.factor * reached))

    def describe(self) -> JsonObject:
        """Its fields in config.json."""
        fields: JsonObject = {"rope_type": self.kind, "factor": self.factor}
        if self.kind != "linear":
            fields["original_max_position_embeddings"] = self.original
        if self.kind == "llama3":
            fields |= {"low_freq_factor": self.low, "high_freq_factor": self.high}
        if self.kind == "yarn":
            names = ("beta_fast", "beta_slow", "truncate", "attention_factor")
            fields |= {name: getattr(self, name) for name in names}
        return fields

    def _llama3(self, plain: Float32[np.ndarray, " half"]) -> Float32[np.ndarray, " half"]:
        wavelengths = np.float32(2 * math.pi) / plain
        scaled = plain / np.float32(self.factor)
        mixed = (self.original / wavelengths - np.float32(self.low)) / np.float32(self.high - self.low)
        between = (1 - mixed) * plain / np.float32(self.factor) + mixed * plain
        result = np.where(wavelengths > self.original / self.low, scaled, between)
        return np.where(wavelengths < self.original / self.high, plain, result)

    def _yarn(self, periods: Float32[np.ndarray, " half"], theta: float) -> Float32[np.ndarray, " half"]:
        dim = 2 * periods.size

        def dimension(turns: float) -> float:
            """The one that turns this often in `original` positions."""
            return dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low or 0.001
        ramp = np.clip(
            (np.arange(periods.size, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1
        )
        kept = 1 - ramp
        divided = np.float32(1) / (np.float32(self.factor) * periods)
        return divided * (1 - kept) + np.float32(1) / periods * kept


def describe_rope(theta: float, scaling: RopeScaling | None) -> JsonObject:
    """`rope_parameters` of config.json."""
    return (scaling.describe() if scaling else {"rope_type": "default"}) | {"rope_theta": theta}


def read_rope(where: str, rope: JsonObject, positions: int) -> tuple[float, RopeScaling | None]:
    """Reads what transformers calls standardized RoPE parameters.

    Args:
      where: the file, for messages.
      rope: `rope_parameters`.
      positions: max_position_embeddings, the pretraining's where nothing else is stated.

    Returns:
      theta, and the scaling; None where there is none.

    Raises:
      InputError: for a scaling that is not supported, or a field of one that is wrong.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *get_args(Kind)):
        supported = ", ".join(get_args(Kind))
        raise InputError(f"{where}: rope scaling of type {shown(kind)} is not supported; {supported} are")
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise InputError(
            f"{where}: rope_parameters by layer type ({shown(nested)}) are not supported; one set is"
        )
    theta = Fields(where, rope).real("rope_theta", DEFAULT_THETA)
    if kind == "default":
        return theta, None
    fields = Fields(f"{where}: rope scaling of type {kind!r}", rope)
    if kind == "yarn":
        return theta, _read_yarn(fields, theta, positions)
    factor = fields.real("factor")
    if kind == "linear":
        return theta, RopeScaling("linear", factor) if factor != 1 else None
    low, high = fields.real("low_freq_factor"), fields.real("high_freq_factor")
    if low >= high:
        raise InputError(f"{fields.where}: high_freq_factor = {high} has to be above low_freq_factor = {low}")
    original = fields.integer("original_max_position_embeddings", positions)
    return theta, RopeScaling("llama3", factor, original, low, high)


def _read_yarn(fields: Fields, theta: float, positions: int) -> RopeScaling:
    """As transformers: absent numbers, and the betas and mscales where they are 0, take YaRN's own."""
    if theta <= 1:
        raise InputError(f"{fields.where}: rope_theta = {theta} has to be above 1")
    original = fields.integer("original_max_position_embeddings", positions)
    if "factor" not in fields.values:
        raise InputError(f"{fields.where}: the field factor is missing")
    options = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    fields = fields.without_null(*options)
    given = {k: v for k, v in fields.values.items() if k not in options[2:] or v != 0}
    fields = dataclasses.replace(fields, values=given)
    factor = fields.real("factor", positions / original)

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = scale(1.0)
    if "mscale" in given and "mscale_all_dim" in given:
        attention = scale(fields.real("mscale")) / scale(fields.real("mscale_all_dim"))
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=fields.real("beta_fast", 32.0),
        beta_slow=fields.real("beta_slow", 1.0),
        truncate=fields.flag("truncate", True),
        attention_factor=fields.real("attention_factor", attention),
    )
