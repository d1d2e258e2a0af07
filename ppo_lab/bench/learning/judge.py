"""The judge: what a trained model's answers are worth, by transformers alone.

A script of its own that knows nothing of any trainer: the model is sampled at temperature 1 on
prompts that it was not trained on, its answers are scored by the reward model (their end marked by
EOS, as reward models are trained), and the KL to the start is the k1 estimate: the sum over the
answer's tokens of log p - log p_start, in nats, mean over answers.

    python judge.py '{"model": ..., "start": ..., "reward_model": ..., "prompts": ..., ...}'
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

ROWS = 64  # samples at a time


@torch.inference_mode()
def judge(
    model: str, start: str, reward_model: str, prompts: str, *, new_tokens: int, seed: int = 0
) -> dict[str, float]:
    """The mean score and KL of one sample a prompt, their standard errors, and variety."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    trained, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (model, start)
    )
    classifier = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    reading = AutoTokenizer.from_pretrained(reward_model, padding_side="right")
    texts = [json.loads(line)["prompt"] for line in Path(prompts).read_text().splitlines()]
    scores, kls, answers = [], [], []
    for rows in batches(texts):
        ids, attention, real = sample(trained, tokenizer, rows, new_tokens)
        log_ratio = logprobs(trained, ids, attention) - logprobs(reference, ids, attention)
        kls.append((log_ratio[:, -real.shape[1] :] * real).sum(1))
        answers += answered(tokenizer, ids, attention.bool(), new=real.shape[1])
        pairs = zip(rows, answers[-len(rows) :], strict=True)
        scores.append(score(classifier, reading, [prompt + answer for prompt, answer in pairs]))
    return summary(torch.cat(scores), torch.cat(kls), answers)


def batches(texts: list[str]) -> Iterator[list[str]]:
    """The texts, a few at a time."""
    return (texts[i : i + ROWS] for i in range(0, len(texts), ROWS))


def sample(
    model: Any, tokenizer: Any, prompts: list[str], new_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with answers as ids, the attention mask of both, and which tokens of the answers are
    real: all up to EOS, which is one of them.
    """
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    ids, before = inputs["input_ids"], inputs["attention_mask"]
    model.generation_config = GenerationConfig()  # nothing that a trainer may have left there
    ids = model.generate(
        input_ids=ids,
        attention_mask=before,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    ended = ids[:, before.shape[1] :] == tokenizer.eos_token_id
    real = ended.long().cumsum(1) - ended.long() == 0
    return ids, torch.cat([before, real.to(before.dtype)], 1), real


def logprobs(model: Any, ids: Tensor, attention: Tensor) -> Tensor:
    """The log-probability of every token but the first, given those before it."""
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits
    return logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)


def answered(tokenizer: Any, ids: Tensor, kept: Tensor, *, new: int) -> list[str]:
    """The answers as texts: what their `new` columns add to the texts of their prompts, a space
    before the first word included.
    """
    found = []
    for row, seen in zip(ids, kept, strict=True):
        before, whole, alone = (
            tokenizer.decode(row[part][seen[part]].tolist(), skip_special_tokens=True)
            for part in (slice(-new), slice(None), slice(-new, None))
        )
        found.append(whole[len(before) :] if whole.startswith(before) else alone)
    return found


def score(classifier: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """What the reward model says of whole texts."""
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return classifier(**kept).logits[:, 0].float()


def summary(scores: Tensor, kls: Tensor, answers: list[str]) -> dict[str, float]:
    """Means, standard deviations and standard errors; the share of different word pairs."""
    words = [answer.lower().split() for answer in answers]
    pairs = [pair for row in words for pair in pairwise(row)]
    n = len(answers)
    return {
        "score": float(scores.mean()),
        "score_sd": float(scores.std()),
        "score_se": float(scores.std()) / math.sqrt(n),
        "kl": float(kls.mean()),
        "kl_se": float(kls.std()) / math.sqrt(n),
        "distinct_2": len(set(pairs)) / max(len(pairs), 1),
        "answers": n,
    }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked.pop("threads", torch.get_num_threads()))
    print(json.dumps(judge(**asked)))
