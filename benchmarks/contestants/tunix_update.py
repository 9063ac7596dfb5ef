"""Tunix 0.1.7's own GRPO loss and training step, padded; see benchmarks/harness.py. Runs in Tunix's environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as loader
from tunix.rl import algo_core, common, trainer
from tunix.rl.grpo.dapo_learner import DAPOConfig
from tunix.sft import peft_trainer

PAD, EOS = 0, 1
folder = Path(sys.argv[1])
shape = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
batch = np.load(folder / "batch.npz")
config = qwen2.ModelConfig(
    num_layers=shape["num_hidden_layers"],
    vocab_size=shape["vocab_size"],
    embed_dim=shape["hidden_size"],
    hidden_dim=shape["intermediate_size"],
    num_heads=shape["num_attention_heads"],
    num_kv_heads=shape["num_key_value_heads"],
    head_dim=shape["hidden_size"] // shape["num_attention_heads"],
    rope_theta=10_000,
    norm_eps=shape["rms_norm_eps"],
    use_tied_embedding=False,
    remat_config=qwen2.RematConfig.NONE,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    use_flash_attention=False,
)
mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
model = loader.create_model_from_safe_tensors(str(folder / "model"), config, mesh, dtype=jnp.float32)
first = int(batch["prompt"])
prompts, completions = batch["tokens"][:, :first], batch["tokens"][:, first:]
live = np.arange(completions.shape[1]) < (batch["lengths"] - first)[:, None]
example = common.TrainExample(
    prompt_ids=jnp.asarray(prompts),
    prompt_mask=jnp.ones(prompts.shape, bool),
    completion_ids=jnp.asarray(completions),
    completion_mask=jnp.asarray(live),
    advantages=jnp.asarray(batch["advantages"]),
    ref_per_token_logps=None,
    old_per_token_logps=jnp.asarray(batch["old_logprobs"][:, first:]),
)
algorithm = DAPOConfig(num_generations=8, overlong_buffer=None)  # token mean, 0.2 / 0.28, no KL
algorithm.temperature = 1.0
own = trainer.Trainer(
    model=model,
    optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, b2=0.999, weight_decay=0.1)),
    training_config=peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9),
    custom_checkpoint_metadata_fn=dict,
)


def loss_of(model: qwen2.Qwen2, train_example: common.TrainExample, algo_config: DAPOConfig) -> object:
    return algo_core.grpo_loss_fn(model, train_example, algo_config=algorithm, pad_id=PAD, eos_id=EOS)


own.with_loss_fn(loss_of, has_aux=True)
own.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": algorithm})
step, _ = own.jit_train_and_eval_step()
for _ in sys.stdin:
    loss, aux, norm = step(example)
    jax.block_until_ready((loss, norm, jax.tree.leaves(own.model)))
    found = {"loss": float(loss), "grad_norm": float(norm), "entropy": float(aux["entropy"])}
    print(json.dumps(found), flush=True)
