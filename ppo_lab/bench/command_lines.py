"""What may be asked of the benchmarks beside the main one, read before anything heavy is imported.

Each function makes the command line of the module of its name, whose `main` takes what was read.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable

from ppo_lab.bench.arguments import (
    cores,
    existing_file,
    list_of,
    model_folder,
    positive,
    result_file,
    seed,
)
from ppo_lab.bench.shapes import ARCHITECTURES, SHAPES

# What `options` can measure, and what a machine must have for it.
OPTIONS = {
    "fast road": "",
    "cache_trunk": "",
    "gradient_checkpointing": "",
    "micro_batch_tokens": "",
    "torch_compile": "",
    "cuda_graphs": "a GPU",
    "adam=8bit": "bitsandbytes",
}


def growth() -> ArgumentParser:
    """How time and memory grow with the work. Time: one PPO iteration at growing batches and
    growing responses; the exponent is the slope of log seconds over log size (1 = linear). Memory:
    what the loss takes on top of head and hidden states, at growing vocabularies.
    """
    p = _parser(growth)
    p.add_argument(
        "--shape", choices=SHAPES, default="small", help="the model, and the work at x 1"
    )
    _add_processes(p, "processes at each size")
    return p


def options() -> ArgumentParser:
    """What each option costs or saves: one iteration with it and one without, in turn; a ratio
    above 1 says by how much the option is faster or smaller.
    """
    p = _parser(options)
    p.add_argument("--shape", choices=SHAPES, default="small", help="the model and the batch")
    p.add_argument("--architecture", choices=ARCHITECTURES, default="bloom", help="its family")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    p.add_argument(
        "--only",
        type=list_of(OPTIONS),
        default=[],
        metavar="NAME,NAME",
        help=f"these options alone, of {', '.join(OPTIONS)}; by default all that can be had here",
    )
    _add_processes(p, "pairs")
    return p


def features() -> ArgumentParser:
    """How much of the score's variance a value head on the policy's trunk could explain at best,
    and one on the reward model's.
    """
    p = _parser(features)
    p.add_argument("--model", type=model_folder, required=True, help="folder of the policy")
    p.add_argument("--reward-model", type=model_folder, required=True, help="folder of its reward")
    p.add_argument("--prompts", type=existing_file, required=True, help="JSON lines with `prompt`")
    p.add_argument(
        "--answers", type=positive, default=1024, help="at most so many prompts are answered"
    )
    p.add_argument("--new-tokens", type=positive, default=48, help="the longest answer")
    p.add_argument("--threads", type=positive, default=cores(), help="threads to compute with")
    p.add_argument("--seed", type=seed, default=0, help="of the sampling")
    return p


def learning() -> ArgumentParser:
    """Who learns most, at how little KL, in how little time."""
    from ppo_lab.bench.learning.command import parser

    return parser()


def _parser(of: Callable[[], ArgumentParser]) -> ArgumentParser:
    """With what all of them take, described by the function that adds the rest."""
    p = ArgumentParser(prog=f"python -m ppo_lab.bench {of.__name__}", description=of.__doc__)
    p.add_argument("--json", type=result_file, help="file that keeps the result")
    return p


def _add_processes(p: ArgumentParser, rounds: str) -> None:
    p.add_argument("--rounds", type=positive, default=3, help=rounds)
    p.add_argument("--threads", type=positive, default=1, help="threads of each process")
