"""The policy on held-out prompts: scores, KL, variety, and the reference's answers to the same
prompts beside its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ppo_lab import core
from ppo_lab.rewards.conversation import content_of
from ppo_lab.rollout import NoiseKey, Sampling
from ppo_lab.types import Prompts, Sample, Scores, Tokens

Gold = Callable[[list[Any], list[str]], list[float]]

# The stream of noise that evaluations draw from: no iteration has this number.
EVALUATION_STREAM = 2**63


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: its numbers (`mean_reward`, `kl`, ...), its texts, and how many iterations
    there were before it (-1 where nobody noted it).
    """

    metrics: dict[str, float]
    samples: list[Sample]
    step: int = -1


class Evaluator:
    """Evaluates a trainer's policy on the same prompts with the same noise every time.

    `gold` scores texts by what neither policy nor reward has seen, where there is such a thing.
    `kept` samples are returned as texts.
    """

    def __init__(
        self,
        trainer: Any,
        prompts: Prompts,
        *,
        sampling: Sampling,
        seed: int,
        kept: int,
        gold: Gold | None = None,
    ) -> None:
        self.trainer, self.prompts, self.sampling = trainer, prompts, sampling
        self.noise, self.kept, self.gold = NoiseKey(seed, EVALUATION_STREAM), kept, gold
        self._reference: tuple[list[str], Scores, list[float] | None] | None = None

    @torch.no_grad()
    def __call__(self, beta: float | None = None) -> Evaluation:
        """Numbers and samples of the policy as it stands; `beta` is that of `objective`, the
        controller's own if none is given.
        """
        tokens, seen = self.trainer.draw(self.prompts, self.sampling, self.noise)
        texts, scores, gold = self._judge(self.prompts, tokens)
        at = {"temperature": self.sampling.logprob_temperature}
        ref = self.trainer.in_passes(tokens, self.trainer.reference.logprobs, **at)
        kl = core.kl_estimate(seen.logprobs, ref, tokens.mask)
        metrics = {
            "mean_reward": float(scores.total.mean()),
            "std_reward": float(scores.total.std()) if len(texts) > 1 else 0.0,
            "kl": float(core.masked_sum(kl, tokens.mask)) / len(texts),
            "response_length": float(tokens.lengths.float().mean()),
            "eos_rate": float(tokens.ended.float().mean()),
            "distinct_2": distinct(texts, n=2),
            **{f"reward/{name}": float(part.mean()) for name, part in scores.parts.items()},
        }
        if gold is not None:
            metrics["gold"] = sum(gold) / len(gold)
        beta = self.trainer.kl_controller.value if beta is None else beta
        metrics["objective"] = metrics["mean_reward"] - beta * metrics["kl"]
        return Evaluation(metrics, self._samples(texts, scores, gold))

    def state_dict(self) -> dict[str, Any]:
        """The reference's answers and their scores, if drawn: a noisy reward would not repeat
        them.
        """
        if self._reference is None:
            return {}
        texts, scores, gold = self._reference
        return {"texts": texts, "total": scores.total, "parts": scores.parts, "gold": gold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. The reference answers anew where more samples are kept now
        than it was asked for then.
        """
        wanted = min(self.kept, len(self.prompts))
        if not state or len(state["texts"]) < wanted:
            self._reference = None
        else:
            scores = Scores(state["total"], state["parts"])
            self._reference = (state["texts"], scores, state["gold"])

    def _judge(
        self, prompts: Prompts, tokens: Tokens
    ) -> tuple[list[str], Scores, list[float] | None]:
        texts = self.trainer.responses(prompts, tokens)
        columns = self.trainer.columns(prompts, tokens)
        scores = self.trainer.reward(prompts=prompts.texts, completions=texts, **columns)
        return texts, scores, None if self.gold is None else self.gold(prompts.texts, texts)

    def _reference_answers(self) -> tuple[list[str], Scores, list[float] | None]:
        """What the reference answers to the prompts that are shown, with the same noise; drawn
        once.
        """
        if self._reference is None:
            shown = self.prompts[: self.kept]
            with self.trainer.reference.active() as trunk:
                tokens, _ = self.trainer.draw(shown, self.sampling, self.noise, trunk)
            self._reference = self._judge(shown, tokens)
        return self._reference

    def _samples(
        self, texts: list[str], scores: Scores, gold: Sequence[float] | None
    ) -> list[Sample]:
        if not self.kept:
            return []
        ref_texts, ref_scores, ref_gold = self._reference_answers()
        return [
            Sample(
                prompt=as_text(self.prompts.texts[i]),
                response=texts[i],
                score=float(scores.total[i]),
                reference_response=ref_texts[i],
                reference_score=float(ref_scores.total[i]),
                gold=None if gold is None else gold[i],
                reference_gold=None if ref_gold is None else ref_gold[i],
            )
            for i in range(min(self.kept, len(texts)))
        ]


def latest_samples(trainer: Any, count: int) -> list[Sample]:
    """The first prompts, responses and scores of the trainer's latest iteration, as texts."""
    if trainer.latest is None:
        return []
    prompts, tokens, scores = trainer.latest
    responses = trainer.responses(prompts, tokens)[:count]
    return [
        Sample(as_text(prompts.texts[i]), response, float(scores.total[i]))
        for i, response in enumerate(responses)
    ]


def distinct(texts: Sequence[str], *, n: int) -> float:
    """The share of different n-grams among all n-grams of words, over all texts; 0 where there is
    none.

    Source: Li et al. 2016, arXiv:1510.03055, section 4.
    """
    words = [text.lower().split() for text in texts]
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def as_text(prompt: Any) -> str:
    """A prompt as one string; of a chat, its last message."""
    return prompt if isinstance(prompt, str) else content_of(prompt[-1])
