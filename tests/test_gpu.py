"""At real sizes, in bfloat16 and on this machine's fastest backend: `make test-gpu`.

Only the cuDNN backends need a GPU; without one, the others run where they are asked for, slowly.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PyTree

import tiny_run
from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.grpo import packing, token_logprobs
from jaxrl.grpo import update as grpo
from jaxrl.grpo.objective import Objective
from jaxrl.grpo.packing import PackedBatch, bucket_lengths
from jaxrl.models import Config, Model, hf, initialize, save
from jaxrl.models.attention import Segments, choose_backend, packed_attention
from jaxrl.parallel.mesh import mesh_over, to_devices
from jaxrl.programs import Programs
from jaxrl.sampling.local import LocalSampler
from jaxrl.types import Backend, Dtype, Prompt, Remat, Rollout, SamplingParams

BUCKETS, STREAM = bucket_lengths(256, 1024), 4096
LAYOUTS = {"ragged": (1000, 37, 513, 256, 1, 700), "full": (1024,) * 4, "one": (300,), "none": ()}


def backend_or_skip(name: Backend) -> Backend:
    try:
        return choose_backend(name, "bfloat16", jax.devices()[0])
    except InputError as error:
        pytest.skip(str(error))


def inputs(heads: int = 12, kv_heads: int = 2, head_dim: int = 128) -> list[jax.Array]:
    """Queries, keys, values, and the cotangent of the output."""
    keys, counts = jax.random.split(jax.random.key(0), 4), (heads, kv_heads, kv_heads, heads)
    shapes = [(STREAM, count, head_dim) for count in counts]
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnums=(5, 6))
def values_and_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    segments: Segments,
    lengths: tuple[int, ...],
    backend: Backend,
) -> tuple[jax.Array, ...]:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return packed_attention(q, k, v, segments, lengths, backend)

    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(d_out)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["xla", pytest.param("cudnn", marks=pytest.mark.gpu)])
def test_packed_is_one_by_one(backend: Backend, layout: str) -> None:
    """Each sequence in a stream of its own, in float32, against all of them in one stream."""
    chosen, lengths = backend_or_skip(backend), LAYOUTS[layout]
    q, k, v, d_out = inputs()
    starts, buckets = np.zeros(8, np.int32), np.full(8, -1, np.int32)
    starts[: len(lengths)] = np.cumsum((0, *lengths))[: len(lengths)]
    buckets[: len(lengths)] = np.searchsorted(BUCKETS, lengths)
    d_out = d_out.at[sum(lengths) :].set(0)
    found = values_and_gradients(q, k, v, d_out, Segments(starts, buckets), BUCKETS, chosen)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found)
    for start, length in zip(starts, lengths, strict=False):
        own = [x[start : start + length].astype(jnp.float32) for x in (q, k, v, d_out)]
        alone = Segments(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
        with jax.default_matmul_precision("highest"):
            expected = values_and_gradients(*own, alone, (length,), "xla")
        for x, y in zip(found, expected, strict=True):
            ours, theirs = np.asarray(x[start : start + length], np.float32), np.asarray(y)
            assert (
                np.linalg.norm(ours - theirs) <= 0.01 * np.linalg.norm(theirs) + 1e-4
            )  # of one token, dq is 0


MODEL = Config(
    family="qwen2",
    vocab_size=32_768,
    width=512,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=128,
    mlp_width=1408,
    rope_theta=10_000.0,
    norm_epsilon=1e-6,
    tied=False,
    max_positions=4096,
)
SMOLLM2 = Path("models/smollm2-135m-instruct")
LAYOUT = packing.Layout(streams=(STREAM,), buckets=BUCKETS)
ADAM = config.Optimizer(learning_rate=1e-3, warmup_steps=0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random weights whose answers differ: `initialize` alone answers nearly the same to all prompts."""
    folder = tmp_path_factory.mktemp("weights")
    save(Model(MODEL, initialize(MODEL, 0, scale=0.06)), folder, dtype="float32")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return folder


def rollouts(count: int, vocabulary: int, longest: int) -> tuple[list[Rollout], np.ndarray]:
    """Random rollouts and an advantage for each."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        prompt, answer = rng.integers(1, longest // 4), rng.integers(1, longest * 3 // 4)
        tokens = rng.integers(2, vocabulary, prompt + answer).astype(np.int32)
        logprobs = rng.normal(-np.log(vocabulary), 0.2, answer).astype(np.float32)
        made.append(Rollout(Prompt("", tokens[:prompt], ""), tokens[prompt:], logprobs, "stop", 0))
    return made, rng.normal(size=count).astype(np.float32)


def pack(made: Sequence[Rollout], advantages: np.ndarray) -> PackedBatch:
    return packing.pack(made, advantages, 1, LAYOUT, learning_rate=ADAM.learning_rate)


def make_programs(model: Config, dtype: Dtype, remat: Remat = "full") -> Programs:
    """The programs on one device."""
    mesh = mesh_over(jax.devices()[:1])
    optimizer = grpo.make_optimizer(ADAM)
    numerics = grpo.Numerics(dtype, remat, choose_backend("auto", dtype, jax.devices()[0]), logprob_chunk=512)
    objective = Objective(clip_low=0.2, clip_high=0.28, dual_clip=10.0)
    functions = grpo.make_update(model, optimizer, mesh, LAYOUT, numerics, objective)
    return Programs(model, mesh, 0, LAYOUT, optimizer, *functions)


def distance(found: PyTree, expected: PyTree) -> float:
    """The relative difference over all leaves."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    apart = sum(float(np.sum((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)) for a, b in pairs)
    return (apart / sum(float(np.sum(np.asarray(b, np.float64) ** 2)) for _, b in pairs)) ** 0.5


@pytest.mark.gpu
def test_logprobs_and_entropies_of_a_whole_vocabulary() -> None:
    """R1-Distill-Qwen's head, in bfloat16: values and gradients against float64, of whole logits."""
    tokens, width, vocabulary = 512, 1536, 151_936
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (tokens, width), jnp.bfloat16)
    head = 0.05 * jax.random.normal(keys[1], (vocabulary, width))
    targets = jax.random.randint(keys[2], (tokens,), 0, vocabulary)
    cotangent = jax.random.normal(keys[3], (tokens,))

    @jax.jit
    def ours(hidden: jax.Array, head: jax.Array) -> tuple[PyTree, PyTree]:
        def loss(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, PyTree]:
            found = token_logprobs(hidden, head, targets, temperature=0.9, chunk=128)
            return jnp.sum(cotangent * found[0]), found

        return jax.grad(loss, (0, 1), has_aux=True)(hidden, head)

    (d_hidden, d_head), (logprobs, entropy) = ours(hidden, head)
    some = np.arange(0, tokens, 37)
    h = np.asarray(hidden[some], np.float64)
    w = np.asarray(head.astype(jnp.bfloat16), np.float64)
    logits = h @ w.T / 0.9
    logits -= logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = np.arange(len(some)), np.asarray(targets)[some]
    np.testing.assert_allclose(logprobs[some], logp[at], atol=2e-3)
    np.testing.assert_allclose(entropy[some], -(np.exp(logp) * logp).sum(-1), rtol=1e-3)
    d_logits = -np.exp(logp)
    d_logits[at] += 1
    d_logits *= np.asarray(cotangent, np.float64)[some, None] / 0.9
    assert distance(d_hidden[some], d_logits @ w) < 0.01  # a bfloat16
    assert d_head.dtype == jnp.float32 and np.isfinite(np.asarray(d_head)).all()
    total = np.asarray(d_head, np.float64).sum(0)
    np.testing.assert_allclose(total, 0, atol=2)  # a softmax's gradients add up to 0


@pytest.mark.gpu
@pytest.mark.parametrize("remat", ["full", "attention", "none"])
def test_a_bfloat16_update_is_nearly_the_float32_one(weights: Path, remat: Remat) -> None:
    made, advantages = rollouts(24, MODEL.vocab_size, BUCKETS[-1])
    batch = pack(made, advantages)
    found = {}
    for dtype in ("float32", "bfloat16"):
        programs = make_programs(MODEL, dtype, remat)
        state = programs.init_state(hf.load(weights).params)
        placed = to_devices(batch, programs.mesh)
        with jax.default_matmul_precision("highest"):
            placed = placed.replace(old_logprobs=programs.logprobs(state.params, placed).logprobs)
            state, metrics = programs.update(state, placed)
        found[dtype] = jax.device_get((state.opt_state[1][0].mu, metrics, placed.old_logprobs))
    live = batch.weights != 0
    apart = np.abs(found["bfloat16"][2] - found["float32"][2])[live]
    assert apart.mean() < 0.05 and apart.max() < 0.5
    assert distance(found["bfloat16"][0], found["float32"][0]) < 0.1  # of the gradient
    for name, tolerance in (("grad_norm", 0.02), ("entropy", 0.01)):
        assert found["bfloat16"][1][name] == pytest.approx(found["float32"][1][name], rel=tolerance), name


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["random", "smollm2"])
def test_logprobs_are_transformers_on_the_same_device(weights: Path, model: str) -> None:
    """Equal in float32; in bfloat16 no further from those than transformers' own."""
    torch = pytest.importorskip("torch")
    import transformers

    folder = weights if model == "random" else SMOLLM2
    if not folder.is_dir():
        pytest.skip(f"no {folder}; recipes/smollm2_from_gguf.py makes it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    ours, theirs = hf.load(folder), {}
    made = rollouts(3, ours.config.vocab_size, 512)[0]
    for dtype in ("float32", "bfloat16"):
        kind = getattr(torch, dtype)
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval().to(device)
        found = []
        for rollout in made:
            row = np.concatenate([rollout.prompt.tokens, rollout.tokens])
            with torch.inference_mode():
                logits = reference(torch.tensor(row[None].astype(int), device=device)).logits[0].float()
            logprobs = torch.log_softmax(logits, -1).cpu().numpy()[np.arange(len(row) - 1), row[1:]]
            found.append(logprobs[len(rollout.prompt.tokens) - 1 :])
        theirs[dtype] = np.concatenate(found)
    batches = [pack([rollout], np.ones(1, np.float32)) for rollout in made]
    apart = {}
    for dtype in theirs:
        programs = make_programs(ours.config, dtype)
        mesh = programs.mesh
        params = jax.device_put(ours.params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        with jax.default_matmul_precision("highest"):
            streams = [
                np.asarray(programs.logprobs(params, to_devices(batch, mesh)).logprobs) for batch in batches
            ]
        found = np.concatenate([x[batch.weights != 0] for x, batch in zip(streams, batches, strict=True)])
        apart[dtype] = np.abs(found - theirs["float32"])
    assert apart["float32"].max() < 1e-3
    usual = np.abs(theirs["bfloat16"] - theirs["float32"])
    assert apart["bfloat16"].mean() < 1.2 * usual.mean() and apart["bfloat16"].max() < 2 * usual.max()


@pytest.mark.gpu
def test_greedy_answers_are_transformers(weights: Path) -> None:
    """In float32: the first token at which they differ, if any, is one where two are as good."""
    torch = pytest.importorskip("torch")
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    theirs = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval().to(device)
    prompts = [rollout.prompt for rollout in rollouts(6, MODEL.vocab_size, 256)[0]]
    model = hf.load(weights)
    with jax.default_matmul_precision("highest"):
        sampler = LocalSampler(model.config, dtype="float32", slots=4)
        sampler.publish(model.params, 0)
        greedy = SamplingParams(temperature=0, max_tokens=64, stop_ids=(1,))
        groups = sampler.generate(prompts, 1, greedy, (0,))
    same = 0
    for prompt, (rollout,) in zip(prompts, groups, strict=True):
        row = torch.tensor(np.concatenate([prompt.tokens, rollout.tokens])[None].astype(int), device=device)
        with torch.inference_mode():
            logits = theirs(row).logits[0, len(prompt.tokens) - 1 : -1].float().cpu().numpy()
        chosen = logits[np.arange(len(rollout.tokens)), rollout.tokens]
        np.testing.assert_array_less(logits.max(-1) - chosen, 1e-3)
        same += (logits.argmax(-1) == rollout.tokens).sum()
    assert same >= 0.99 * sum(len(rollout.tokens) for (rollout,) in groups)


@pytest.mark.gpu
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """On this machine's own device; kernels that add up in any order are switched off."""
    from test_train import optimizer_bytes

    base = tiny_run.make_base(tmp_path / "base")
    here = {
        "JAX_PLATFORMS": jax.default_backend().replace("gpu", "cuda"),
        "XLA_FLAGS": "--xla_gpu_deterministic_ops=true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1",  # this process has its own share
    }
    runs = []
    for name, stops in (("whole", (6,)), ("stopped", (4, 6))):
        (tmp_path / name).mkdir()
        recipe = tiny_run.write_recipe(tmp_path / name, base)
        for steps in stops:
            process = tiny_run.jaxrl("train", recipe, "--run.steps", steps, **here)
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
        runs.append(optimizer_bytes(tmp_path / name / "run"))
    assert runs[0] == runs[1]
