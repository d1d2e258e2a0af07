"""One PPO iteration of this project, measured by phase."""

from __future__ import annotations

from typing import Any

import torch
from metering import Meter, asked, lora, random_model, report, tokenizer

from ppo_lab import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_lab.rollout import Sampling
from ppo_lab.types import Prompts, Scores


def main() -> None:
    """Warm up, measure, report."""
    spec = asked()
    torch.set_num_threads(spec["threads"])
    trainer = make_trainer(spec)
    prompts = Prompts(ids=spec["prompts"], texts=[""] * len(spec["prompts"]))
    scores = Scores(torch.linspace(-1, 1, len(spec["prompts"])))
    meters = [
        iteration(trainer, prompts, scores) for _ in range(spec["warm_up"] + spec["measured"])
    ]
    report(meters[spec["warm_up"] :])


def make_trainer(spec: dict[str, Any]) -> PPOTrainer:
    """The trainer, its options those of the benchmark's command."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        random_model(spec), peft_config=lora(spec)
    )
    model.trunk.fast_layers = spec.get("road") != "transformers"
    model.trunk.records_graphs = spec.get("cuda_graphs", True)
    if spec.get("compiled"):
        model.trunk.compile()
    return PPOTrainer(
        PPOConfig(
            batch_size=len(spec["prompts"]),
            mini_batch_size=spec["mini_batch_size"],
            ppo_epochs=spec["ppo_epochs"],
            max_grad_norm=1.0,  # as a run has it
            seed=spec["seed"],
            **spec.get("ppo", {}),
        ),
        model,
        tokenizer=tokenizer(spec),
        sampling=Sampling(max_new_tokens=spec["new_tokens"], eos_ids=(), pad_id=0),
    )


def iteration(trainer: PPOTrainer, prompts: Prompts, scores: Scores) -> Meter:
    """The iteration of the trainer, with given scores in place of a reward's."""
    meter = Meter()
    meter.switch("generate")
    tokens, seen = trainer.sample(prompts)
    meter.switch("score")
    rollout = trainer.collect(tokens, seen)
    meter.switch("update")
    metrics = trainer.learn(rollout, scores)
    meter.switch()
    assert tokens.responses.shape[1] == trainer.sampling.max_new_tokens
    assert metrics["ppo/skipped_updates"] == 0
    return meter


if __name__ == "__main__":
    main()
