"""One decoder for Qwen2, Qwen3 and Llama: a config, a table of parameters, and pure functions over a pytree.

Matrices keep Hugging Face's orientation, [out, in]; the layers' parameters of one name are stacked on a leading axis L,
over which the layers are scanned.

Shape letters: B rows ("*B": any leading axes), N tokens, L layers, D width, H query heads, K key/value heads,
V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NotRequired, Protocol, TypedDict, TypeVar  # noqa: TID251  # `Cache`

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Float32, Int, Shaped

from jaxrl.arrays import Array
from jaxrl.errors import InputError
from jaxrl.rope import RopeScaling
from jaxrl.types import Remat

Leaf = TypeVar("Leaf")


class ParamTree(TypedDict, Generic[Leaf]):
    """Something for each parameter; `layers` is stacked over layers where it holds arrays."""

    embed: Leaf
    layers: dict[str, Leaf]
    norm: Leaf
    head: NotRequired[Leaf]  # absent where the LM head is the embedding


Params = ParamTree[jax.Array]
Layer = dict[str, jax.Array]  # the parameters of one layer
# What is kept of each layer for the backward pass, beside its input; packed_attention names its output and its lse.
KEPT: dict[Remat, tuple[str, ...]] = {
    "full": (),
    "attention": ("attention",),
    "projections": ("attention", "qkv", "residual"),
    "products": ("attention", "qkv", "residual", "mlp"),  # all matrix products
}
Cache = Any  # a pytree that only `attend` understands


class Attend(Protocol):
    """Attention of one layer: packed, dense, or against a cache.

    Args:
      q, k, v: queries, keys and values.
      cache: this layer's slice of the cache that `forward` was given.

    Returns:
      the output, and what to keep of this layer; `forward` stacks it over layers.
    """

    def __call__(
        self,
        q: Float[jax.Array, "*B N H head_dim"],
        k: Float[jax.Array, "*B N K head_dim"],
        v: Float[jax.Array, "*B N K head_dim"],
        cache: Cache,
        /,
    ) -> tuple[Float[jax.Array, "*B N H head_dim"], Cache]: ...


@dataclass(frozen=True)
class Config:
    """Everything that the shape and the arithmetic of the decoder depend on."""

    family: Literal["qwen2", "qwen3", "llama"]
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float
    norm_epsilon: float
    tied: bool  # the LM head is the embedding
    max_positions: int  # as config.json states them; see `positions`
    rope_scaling: RopeScaling | None = None

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence."""
        return self.rope_scaling.positions(self.max_positions) if self.rope_scaling else self.max_positions

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"


@dataclass(frozen=True)
class Spec:
    """One parameter. `name` is Hugging Face's; with '{}' for the layer, the array is stacked over layers."""

    name: str
    shape: tuple[int, ...]  # of one layer
    init: Literal["normal", "ones", "zeros"] = "normal"

    @property
    def stacked(self) -> bool:
        return "{}" in self.name


def declare(c: Config) -> ParamTree[Spec]:
    """The table of parameters, from which initialization, loading, saving and sharding follow."""
    layer = "model.layers.{}."
    heads, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    layers = {
        "attention_norm": Spec(layer + "input_layernorm.weight", (c.width,), "ones"),
        "q": Spec(layer + "self_attn.q_proj.weight", (heads, c.width)),
        "k": Spec(layer + "self_attn.k_proj.weight", (kv, c.width)),
        "v": Spec(layer + "self_attn.v_proj.weight", (kv, c.width)),
        "o": Spec(layer + "self_attn.o_proj.weight", (c.width, heads)),
        "mlp_norm": Spec(layer + "post_attention_layernorm.weight", (c.width,), "ones"),
        "gate": Spec(layer + "mlp.gate_proj.weight", (c.mlp_width, c.width)),
        "up": Spec(layer + "mlp.up_proj.weight", (c.mlp_width, c.width)),
        "down": Spec(layer + "mlp.down_proj.weight", (c.width, c.mlp_width)),
    }
    if c.qkv_bias:
        layers |= {
            f"{x}_bias": Spec(f"{layer}self_attn.{x}_proj.bias", (size,), "zeros")
            for x, size in (("q", heads), ("k", kv), ("v", kv))
        }
    if c.qk_norm:
        layers |= {
            f"{x}_norm": Spec(f"{layer}self_attn.{x}_norm.weight", (c.head_dim,), "ones") for x in ("q", "k")
        }
    table: ParamTree[Spec] = {
        "embed": Spec("model.embed_tokens.weight", (c.vocab_size, c.width)),
        "layers": layers,
        "norm": Spec("model.norm.weight", (c.width,), "ones"),
    }
    if not c.tied:
        table["head"] = Spec("lm_head.weight", (c.vocab_size, c.width))
    return table


def specs(c: Config) -> list[Spec]:
    """The table's entries in the order of `jax.tree.leaves(params)`."""
    return jax.tree.leaves(declare(c))


def stacked_shape(spec: Spec, c: Config) -> tuple[int, ...]:
    return (c.layers, *spec.shape) if spec.stacked else spec.shape


def require_positions(c: Config, tokens: int) -> None:
    """Raises: InputError if the model has no room for a prompt and its answer of so many tokens together."""
    if tokens > c.positions:
        raise InputError(
            f"prompts and answers of up to {tokens} tokens are more than the model's {c.positions} positions; lower "
            "rollout.max_tokens, eval.max_tokens or data.max_prompt_tokens"
        )


def forward_flops(c: Config) -> tuple[int, int]:
    """Matrix-multiply FLOPs of a forward pass: per token (layers and LM head), and per token and attended token."""
    heads, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    layer = c.width * (2 * heads + 2 * kv + 3 * c.mlp_width)
    return 2 * (c.layers * layer + c.width * c.vocab_size), 4 * c.layers * heads


def initialize(c: Config, seed: int, dtype: str = "float32", scale: float = 0.02) -> Params:
    """Random parameters: normal(0, scale) matrices, unit norms, zero biases (transformers' initialization)."""
    declared, tree = jax.tree.flatten(declare(c))
    keys = jax.random.split(jax.random.key(seed), len(declared))

    def create(spec: Spec, key: jax.Array) -> jax.Array:
        shape = stacked_shape(spec, c)
        if spec.init == "normal":
            return scale * jax.random.normal(key, shape, dtype)
        return (jnp.ones if spec.init == "ones" else jnp.zeros)(shape, dtype)

    return jax.tree.unflatten(tree, map(create, declared, keys))


def parameters(c: Config) -> int:
    """The number of a model's parameters."""
    return sum(math.prod(stacked_shape(spec, c)) for spec in specs(c))


def abstract_params(c: Config) -> Params:
    """Shapes and dtypes of the parameters, in float32."""
    return jax.eval_shape(lambda: initialize(c, 0))


def head(params: Params) -> Float[jax.Array, "V D"]:
    """The LM head."""
    return params["head"] if "head" in params else params["embed"]


def forward(
    config: Config,
    params: Params,
    tokens: Int[Array, "*B N"],
    positions: Int[Array, "*B N"],
    attend: Attend,
    *,
    cache: Cache = None,
    dtype: str = "float32",
    remat: Remat = "none",
    fetch: Callable[[Layer], Layer] | None = None,
) -> tuple[Float[jax.Array, "*B N D"], Cache]:
    """Runs the decoder up to the final norm.

    Args:
      tokens: token ids.
      positions: from 0 in each sequence.
      attend: attention of one layer.
      cache: pytree with a leading layer axis, handed to `attend` slice by slice, or None.
      dtype: of the computation; norms, rotations and softmax are float32 inside.
      remat: what the backward pass recomputes.
      fetch: makes a layer's parameters of its slice of `params["layers"]`; None takes the slice as it is.

    Returns:
      hidden states in `dtype`, and what `attend` kept, stacked over layers.
    """

    def one(
        h: Float[jax.Array, "*B N D"], inputs: tuple[Layer, Cache]
    ) -> tuple[Float[jax.Array, "*B N D"], Cache]:
        w, layer_cache = inputs
        return layer(config, fetch(w) if fetch else w, h, positions, attend, layer_cache)

    if remat != "none":
        save = jax.checkpoint_policies.save_only_these_names(*KEPT[remat])
        one = jax.checkpoint(one, prevent_cse=False, policy=save)
    h, kept = jax.lax.scan(one, params["embed"][tokens].astype(dtype), (params["layers"], cache))
    return rms_norm(h, params["norm"].astype(dtype), config.norm_epsilon), kept


def layer(
    config: Config,
    w: Layer,
    h: Float[jax.Array, "*B N D"],
    positions: Int[Array, "*B N"],
    attend: Attend,
    cache: Cache = None,
) -> tuple[Float[jax.Array, "*B N D"], Cache]:
    """One layer, computed in the dtype of its input; see `forward`."""
    w = jax.tree.map(lambda a: a.astype(h.dtype), w)
    with jax.named_scope("attention"):
        x = rms_norm(h, w["attention_norm"], config.norm_epsilon)
        q, k, v = (_named(x, "qkv", 1 + i) for i, x in enumerate(_qkv(config, w, x, positions)))
        out, kept = attend(q, k, v, cache)
        h = _named(h + _linear(out.reshape(*h.shape[:-1], -1), w["o"]), "residual", 1)
    with jax.named_scope("mlp"):
        x = rms_norm(h, w["mlp_norm"], config.norm_epsilon)
        gate, up = (_named(_linear(x, w[name]), "mlp", i) for i, name in enumerate(("gate", "up")))
        h = h + _linear(jax.nn.silu(gate) * up, w["down"])
    return h, kept


def _named(x: Float[jax.Array, " ..."], name: str, axes: int) -> Float[jax.Array, " ..."]:
    """A `checkpoint_name` for x with so many axes more.

    The scan over layers stacks what is kept. Of two stacks of one shape, XLA would fill one with zeros and copy it.
    """
    return checkpoint_name(x.reshape((1,) * axes + x.shape), name).reshape(x.shape)


def dense_attend(
    q: Float[jax.Array, "B N H head_dim"],
    k: Float[jax.Array, "B N K head_dim"],
    v: Float[jax.Array, "B N K head_dim"],
    _: None,
) -> tuple[Float[jax.Array, "B N H head_dim"], tuple[jax.Array, jax.Array]]:
    """Causal attention within each row; keeps keys and values (a prefill)."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), (k, v)


def logits(
    config: Config, params: Params, tokens: Int[Array, "B N"], dtype: str = "float32"
) -> Float32[jax.Array, "B N V"]:
    """Next-token logits of whole rows, for tests and small models."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
    hidden, _ = forward(config, params, tokens, positions, dense_attend, dtype=dtype)
    return jnp.einsum("...d,vd->...v", hidden, head(params).astype(dtype), preferred_element_type=jnp.float32)


def rms_norm(
    x: Float[jax.Array, "*B D"], weight: Float[jax.Array, " D"], epsilon: float
) -> Float[jax.Array, "*B D"]:
    """Root-mean-square norm over the last axis (arXiv 1910.07467), computed in float32."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return _in_float32(jnp.multiply, (x32 * scale).astype(x.dtype), weight)


def rope(
    x: Float[jax.Array, "*B N heads head_dim"],
    positions: Int[Array, "*B N"],
    theta: float,
    scaling: RopeScaling | None = None,
) -> Float[jax.Array, "*B N heads head_dim"]:
    """Rotary embedding, halves convention (arXiv 2104.09864), computed in float32."""
    half = x.shape[-1] // 2
    if scaling:
        frequencies = jnp.asarray(scaling.frequencies(theta, x.shape[-1]))
    else:
        frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions = positions[..., None, None].astype(jnp.float32)
    angles = positions * _over_last(frequencies, positions)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    if scaling and scaling.attention_factor != 1:
        sin, cos = sin * scaling.attention_factor, cos * scaling.attention_factor
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _linear(
    x: Float[jax.Array, "*B inner"],
    w: Float[jax.Array, "outer inner"],
    bias: Float[jax.Array, " outer"] | None = None,
) -> Float[jax.Array, "*B outer"]:
    y = jnp.einsum("...i,oi->...o", x, w)
    return y if bias is None else _in_float32(jnp.add, y, bias)


def _in_float32(
    op: Callable[[jax.Array, jax.Array], jax.Array], x: Float[jax.Array, "*B D"], w: Float[jax.Array, " D"]
) -> Float[jax.Array, "*B D"]:
    """op(x, w) in x's dtype: the same bits, but the gradient of w sums over tokens in float32."""
    return op(x.astype(jnp.float32), _over_last(w, x).astype(jnp.float32)).astype(x.dtype)


def _over_last(w: Float[jax.Array, " D"], x: Shaped[Array, " ..."]) -> Float[jax.Array, "*ones D"]:
    """Gives w as many axes as x has: ranks are never promoted silently."""
    return w.reshape((1,) * (x.ndim - 1) + w.shape)


def _qkv(
    c: Config, w: Layer, x: Float[jax.Array, "*B N D"], positions: Int[Array, "*B N"]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = (
        _linear(x, w[name], w.get(f"{name}_bias")).reshape(*x.shape[:-1], heads, c.head_dim)
        for name, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads))
    )
    if c.qk_norm:
        q, k = rms_norm(q, w["q_norm"], c.norm_epsilon), rms_norm(k, w["k_norm"], c.norm_epsilon)
    rotate = functools.partial(rope, positions=positions, theta=c.rope_theta, scaling=c.rope_scaling)
    return rotate(q), rotate(k), v
