"""One PPO iteration of this project, measured by phase."""

from __future__ import annotations

import torch
from metering import Meter, asked, lora, random_bloom, report, tokenizer

from ppo_lab import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_lab.rollout import Sampling
from ppo_lab.types import Prompts, Scores


def main() -> None:
    """Warm up, measure, report."""
    spec = asked()
    torch.set_num_threads(spec["threads"])
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        random_bloom(spec), peft_config=lora(spec)
    )
    trainer = PPOTrainer(
        PPOConfig(
            batch_size=len(spec["prompts"]),
            mini_batch_size=spec["mini_batch_size"],
            ppo_epochs=spec["ppo_epochs"],
            seed=spec["seed"],
        ),
        model,
        tokenizer=tokenizer(spec),
        sampling=Sampling(max_new_tokens=spec["new_tokens"], eos_ids=(), pad_id=0),
    )
    prompts = Prompts(ids=spec["prompts"], texts=[""] * len(spec["prompts"]))
    scores = Scores(torch.linspace(-1, 1, len(spec["prompts"])))
    meters = [
        iteration(trainer, prompts, scores) for _ in range(spec["warm_up"] + spec["measured"])
    ]
    report(meters[spec["warm_up"] :])


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
    assert (
        metrics["ppo/policy/skipped_updates"] == 0
        if "ppo/policy/skipped_updates" in metrics
        else True
    )
    return meter


if __name__ == "__main__":
    main()
