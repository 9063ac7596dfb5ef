"""TRL's own GRPOTrainer, with a jaxrl recipe's hyperparameters; see benchmarks/vs_trl.py. Runs in TRL's environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerState
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from jaxrl.rewards import strict_boxed

ORDER = ("prompt_ids", "completion_ids", "completion_mask", "advantages")
s = json.loads(sys.argv[1])
out, updates = Path(s["out"]), s["updates"]  # optimizer steps to a batch of rollouts
torch.set_num_threads(s["threads"])
model = AutoModelForCausalLM.from_pretrained(s["model"], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(s["model"])
rows = [json.loads(line) for line in Path(s["data"]).read_text(encoding="utf-8").splitlines()]
if s["whole_groups"]:  # mini-batches of whole prompts in order; TRL would shuffle across prompts
    grpo_trainer.shuffle_sequence_dict = lambda batch: batch
# every parameter decays, and the first of the `warmup` batches runs at rate 0: Trainer's own optimizer does neither
optimizer = torch.optim.AdamW(model.parameters(), lr=s["learning_rate"], weight_decay=s["weight_decay"])
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda u: min(1.0, (u // updates) / s["warmup"]))
rewards: list[float] = []


def reward(completions: list[str], answer: list[str], **_: object) -> list[float]:
    rewards[:] = [strict_boxed(*pair) for pair in zip(completions, answer, strict=True)]
    return list(rewards)


class Record(TrainerCallback):
    """Writes a row of metrics a batch of rollouts, and the weights now and then; in a check, all that jaxrl repeats."""

    def on_step_end(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        step, update = divmod(state.global_step, updates)
        if s["rollouts"]:
            model.save_pretrained(out / f"update_{state.global_step}")
            if not update:
                # TRL has shuffled the sequences of all prompts before it cut the batch into mini-batches
                batches = trainer._buffered_inputs
                order = {key: np.concatenate([b[key].numpy() for b in batches]) for key in ORDER}
                np.savez(out / f"order_{step - 1}.npz", **order)
        elif not update:
            row = {"step": step - 1, "reward/accuracy": (np.mean(rewards) + 1) / 2}
            with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if step % s["save_every"] == 0:
                model.save_pretrained(out / f"step_{step}")


def given(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[list[float]]]:
    """Reads rollouts from a file in place of sampling them."""
    batch = json.loads(
        (Path(s["rollouts"]) / f"{trainer.state.global_step // updates}.json").read_text(encoding="utf-8")
    )
    assert [tokenizer.encode(p, add_special_tokens=False) for p in prompts] == batch["prompt_ids"]
    return batch


config = GRPOConfig(
    output_dir=str(out),
    use_cpu=True,
    bf16=False,
    report_to="none",
    save_strategy="no",
    logging_steps=10**9,
    disable_tqdm=True,
    gradient_checkpointing=False,
    seed=s["seed"],
    shuffle_dataset=False,
    max_steps=s["steps"] * updates,
    steps_per_generation=updates,
    num_generations=s["samples"],
    per_device_train_batch_size=s["prompts"] * s["samples"] // updates,
    max_completion_length=s["max_tokens"],
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    loss_type="bnpo",  # the token mean of a mini-batch
    scale_rewards="group",
    beta=0.0,
    epsilon=s["clip_low"],
    epsilon_high=s["clip_high"],
    delta=s["dual_clip"],
    max_grad_norm=s["max_grad_norm"],
)
trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=reward,
    train_dataset=Dataset.from_list(rows),
    optimizers=(optimizer, scheduler),
    callbacks=[Record()],
    rollout_func=given if s["rollouts"] else None,
    args=config,
)
trainer.train()
