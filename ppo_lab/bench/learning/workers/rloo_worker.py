"""TRL 1.16's RLOO: no critic, the other samples of a prompt are the baseline (4 a prompt)."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402
from trl import RLOOConfig, RLOOTrainer  # noqa: E402

SAMPLES_A_PROMPT = 4


def main() -> None:
    """Train as asked, and save."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    lines = Path(spec["prompts"]).read_text().splitlines()
    with tempfile.TemporaryDirectory() as folder:
        trainer = RLOOTrainer(
            model=spec["model"],
            reward_funcs=reward(spec["reward_model"]),
            args=settings(spec, folder),
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
            processing_class=AutoTokenizer.from_pretrained(spec["model"], padding_side="left"),
        )
        trainer.train()
    trainer.model.save_pretrained(spec["output"])


def reward(folder: str) -> Any:
    """The reward model as a function, on texts that end with EOS as in its training."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    @torch.no_grad()
    def scores(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        texts = [p + c for p, c in zip(prompts, completions, strict=True)]
        rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
        inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return classifier(**kept).logits[:, 0].tolist()

    return scores


def settings(spec: dict[str, Any], folder: str) -> RLOOConfig:
    """The trainer's defaults, but for the work itself."""
    steps = spec["iterations"] * spec["epochs"] * spec["batch"] // spec["mini_batch"]
    return RLOOConfig(
        output_dir=folder,
        per_device_train_batch_size=spec["mini_batch"],
        gradient_accumulation_steps=1,
        steps_per_generation=spec["batch"] // spec["mini_batch"],
        num_iterations=spec["epochs"],
        num_generations=SAMPLES_A_PROMPT,
        max_steps=steps,
        max_completion_length=spec["new_tokens"],
        temperature=1.0,
        beta=spec["beta"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        seed=spec["seed"],
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


if __name__ == "__main__":
    main()
