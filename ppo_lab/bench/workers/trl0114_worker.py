"""One PPO iteration of TRL 0.11.4's classic trainer, measured by phase.

It is given what it needs to be at its best: the whole batch generated at once (its default is four
prompts at a time), and the reference on the same trunk with the adapter off.
"""

from __future__ import annotations

import warnings

import torch
from metering import Meter, asked, lora, random_model, report, tokenizer

warnings.filterwarnings("ignore")

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer  # noqa: E402


def main() -> None:
    """Warm up, measure, report."""
    spec = asked()
    torch.set_num_threads(spec["threads"])
    from peft import get_peft_model

    adapted = get_peft_model(random_model(spec), lora(spec))
    config = PPOConfig(
        batch_size=len(spec["prompts"]),
        mini_batch_size=spec["mini_batch_size"],
        ppo_epochs=spec["ppo_epochs"],
        seed=spec["seed"],
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(adapted)
    trainer = PPOTrainer(config, model, tokenizer=tokenizer(spec))
    meter = hook(trainer)
    meters = []
    for _ in range(spec["warm_up"] + spec["measured"]):
        meter.phases = {}
        iteration(trainer, meter, spec)
        meters.append(Meter())
        meters[-1].phases = meter.phases
    report(meters[spec["warm_up"] :])


def hook(trainer: PPOTrainer) -> Meter:
    """A meter that learns from the trainer's own calls when the updates begin."""
    meter, compute_rewards = Meter(), trainer.compute_rewards

    def rewards(*args: object, **kwargs: object) -> object:
        meter.switch("update")
        return compute_rewards(*args, **kwargs)

    trainer.compute_rewards = rewards
    return meter


def iteration(trainer: PPOTrainer, meter: Meter, spec: dict) -> None:
    """Generate, and step on given scores."""
    queries = [torch.tensor(ids) for ids in spec["prompts"]]
    meter.switch("generate")
    responses = trainer.generate(
        queries,
        batch_size=len(queries),
        return_prompt=False,
        max_new_tokens=spec["new_tokens"],
        do_sample=True,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert all(len(response) == spec["new_tokens"] for response in responses)
    meter.switch("score")
    trainer.step(queries, responses, list(torch.linspace(-1, 1, len(queries))))
    meter.switch()


if __name__ == "__main__":
    main()
