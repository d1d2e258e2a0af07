"""TRL 0.11.4's classic trainer: a value head on the policy, a loop of one's own around it.

It is given what it needs to be at its best: the whole batch generated at once, scores by the reward
model in one pass, on texts that end with EOS as in the reward model's training.
"""

from __future__ import annotations

import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer  # noqa: E402


def main() -> None:
    """Train as asked, and save."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    tokenizer, reading = (load_tokenizer(spec[name]) for name in ("model", "reward_model"))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(spec["model"])
    classifier = AutoModelForSequenceClassification.from_pretrained(spec["reward_model"]).eval()
    config = PPOConfig(
        batch_size=spec["batch"],
        mini_batch_size=spec["mini_batch"],
        ppo_epochs=spec["epochs"],
        learning_rate=spec["learning_rate"],
        init_kl_coef=spec["beta"],
        adap_kl_ctrl=False,
        seed=spec["seed"],
    )
    trainer = PPOTrainer(config, model, tokenizer=tokenizer)
    for prompts in batches(spec):
        iteration(trainer, tokenizer, classifier, reading, prompts, spec["new_tokens"])
    model.pretrained_model.save_pretrained(spec["output"])


def load_tokenizer(folder: str) -> Any:
    """The tokenizer by its own file: this transformers is older than the folder's settings."""
    settings = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    special = {k: settings[k] for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
    file = str(Path(folder) / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, padding_side="left", **special)


def batches(spec: dict[str, Any]) -> Any:
    """Batches of prompts, a new order every epoch."""
    lines = Path(spec["prompts"]).read_text().splitlines()
    texts, order = [json.loads(line)["prompt"] for line in lines], random.Random(spec["seed"])
    waiting: list[str] = []
    for _ in range(spec["iterations"]):
        if len(waiting) < spec["batch"]:
            waiting += order.sample(texts, len(texts))
        yield waiting[: spec["batch"]]
        waiting = waiting[spec["batch"] :]


def iteration(
    trainer: PPOTrainer,
    tokenizer: Any,
    classifier: Any,
    reading: Any,
    prompts: list[str],
    new_tokens: int,
) -> None:
    """Generate, score, step."""
    queries = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    responses = trainer.generate(
        queries,
        batch_size=len(queries),
        return_prompt=False,
        max_new_tokens=new_tokens,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pairs = zip(queries, responses, strict=True)
    # Of both at once: by itself a response would lose the space before its first word.
    texts = [tokenizer.decode(torch.cat(pair), skip_special_tokens=True) for pair in pairs]
    trainer.step(queries, responses, list(scores(classifier, reading, texts)))


@torch.no_grad()
def scores(classifier: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """What the reward model says of whole texts."""
    rows = [torch.tensor([*tokenizer(t)["input_ids"], tokenizer.eos_token_id]) for t in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, classifier.config.pad_token_id)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], True, 0)
    return classifier(input_ids=ids, attention_mask=mask).logits[:, 0]


if __name__ == "__main__":
    main()
