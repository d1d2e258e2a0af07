"""What scores responses."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import tiny
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BloomConfig,
    FNetConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    PreTrainedTokenizerFast,
    XLNetConfig,
)

from ppo_lab.config import (
    ConstantReward,
    FunctionReward,
    LengthReward,
    ModelReward,
    VaderReward,
    WeightedReward,
)
from ppo_lab.errors import ConfigError
from ppo_lab.experiment import build
from ppo_lab.rewards import RewardError, build_reward, check_columns, problems
from ppo_lab.rewards.classifier import Classifier, label_index
from ppo_lab.rewards.conversation import joined
from ppo_lab.rewards.function import FunctionScorer, within
from ppo_lab.rewards.loading import load_classifier, load_reward_tokenizer
from ppo_lab.rewards.scoring import checked_scores
from ppo_lab.signals import Preempted

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An importable module, empty, to put reward functions into."""
    module = ModuleType("rewards_of_the_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def function_reward(functions: ModuleType, function: Any, **settings: Any) -> Any:
    functions.reward = function
    section = FunctionReward(name="mine", target="rewards_of_the_test:reward", **settings)
    return build_reward(section, device="cpu")


# ---- weights, parts, checks


def test_the_weight_is_in_the_total_and_not_in_the_part() -> None:
    scores = build_reward(ConstantReward(name="c", value=2.0, weight=-1.5), device="cpu")(
        ["p"], ["r"]
    )
    assert (scores.total.tolist(), scores.parts["c"].tolist()) == ([-3.0], [2.0])
    assert scores.total.dtype == torch.float32


def test_a_weighted_sum_logs_its_parts_by_their_keys() -> None:
    inner = WeightedReward(weight=10.0, parts={"one": ConstantReward(value=1.0, weight=2.0)})
    section = WeightedReward(
        name="mix",
        weight=0.5,
        parts={"words": LengthReward(weight=3.0), "low": ConstantReward(value=-1.0), "deep": inner},
    )
    scores = build_reward(section, device="cpu")(["p", "p"], ["a b", "a"])
    assert scores.total.tolist() == [0.5 * (6 - 1 + 20), 0.5 * (3 - 1 + 20)]
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "words": [2.0, 1.0],
        "low": [-1.0, -1.0],
        "deep/one": [1.0, 1.0],
    }


def test_a_reward_without_a_name_is_called_by_its_kind() -> None:
    assert build_reward(LengthReward(), device="cpu").name == "length"


@pytest.mark.parametrize(
    "raw",
    [
        [1, 2.5],
        (1.0, 2.5),
        torch.tensor([1.0, 2.5], requires_grad=True),
        torch.tensor([[1.0], [2.5]], dtype=torch.bfloat16),
        np.array([1.0, 2.5]),
        [torch.tensor(1.0), np.float64(2.5)],
        [True, torch.tensor([2.5])],
    ],
)
def test_lists_tensors_and_arrays_of_numbers_are_scores(raw: Any) -> None:
    scores = checked_scores("r", raw, ["p", "p"], ["a", "b"])
    assert (scores.tolist(), scores.requires_grad) == ([1.0, 2.5], False)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([1.0], "1 scores came back for 2 samples"),
        ([1.0, 2.0, 3.0], "3 scores came back for 2 samples"),
        (1.0, "it returned float"),
        ("ab", "it returned str"),
        (None, "it returned NoneType"),
        ({0: 1.0, 1: 2.0}, "it returned dict"),
        (torch.tensor(1.0), "it returned float"),
        ([1.0, math.nan], r"sample 1 of the batch \(prompt 'q', completion 'b'\) is nan"),
        ([math.inf, 1.0], r"sample 0 .*completion 'a'\) is inf"),
        ([1.0, 1e39], "sample 1 .* is 1e\\+39, not a finite number"),
        ([10**400, 1.0], "sample 0 .* is inf, not a finite number"),
        ([1.0, "2"], r"sample 1 .* is \"'2'\" \(str\), not a number"),
        ([1.0, None], r"sample 1 .* \(NoneType\), not a number"),
        ([1.0, [2.0, 3.0]], r"sample 1 .* \(list\), not a number"),
        (torch.zeros(2, 3), r"sample 0 .* \(list\), not a number"),
        ([1j, 1.0], r"sample 0 .* \(complex\), not a number"),
        (torch.eye(2).to_sparse(), r"cannot be read .*a dense tensor"),
        (torch.ones(2, 1).to_sparse(), r"cannot be read .*a dense tensor"),
        (torch.ones(2, device="meta"), r"cannot be read .*a dense tensor"),
        ([1.0, torch.ones((), device="meta")], r"cannot be read .*a dense tensor"),
    ],
)
def test_anything_but_one_finite_number_a_sample_is_refused(raw: Any, message: str) -> None:
    """R-03, R-06."""
    with pytest.raises(RewardError, match=f"^reward 'r': .*{message}"):
        checked_scores("r", raw, ["p", "q"], ["a", "b"])


def test_a_reward_error_is_a_users_error_with_shortened_texts() -> None:
    with pytest.raises(ConfigError) as error:
        checked_scores("r", [math.nan], ["x" * 10_000], ["y"])
    assert len(str(error.value)) < 250
    assert isinstance(error.value, ValueError)


# ---- length, constant, vader


def test_length_counts_words_or_characters_or_the_distance_from_an_ideal() -> None:
    texts = ["", "one two  three"]
    sections = [LengthReward(), LengthReward(unit="characters"), LengthReward(ideal=4)]
    totals = [build_reward(s, device="cpu")(["", ""], texts).total.tolist() for s in sections]
    assert totals == [[0.0, 3.0], [0.0, 14.0], [-1.0, -0.25]]


def test_vader_scores_the_response_as_the_shared_preferences_were_scored(assets: Path) -> None:
    lines = (assets / "data" / "story_preferences.jsonl").read_text().splitlines()[:100]
    rows = [json.loads(line) for line in lines]
    reward = build_reward(VaderReward(), device="cpu")
    scores = reward([r["prompt"] for r in rows], [r["chosen"] for r in rows])
    torch.testing.assert_close(scores.total, torch.tensor([r["score_chosen"] for r in rows]))


def test_vader_can_read_the_prompt_as_well() -> None:
    reward = build_reward(VaderReward(text="prompt_and_completion"), device="cpu")
    happy, sad, chat = reward(
        ["Great joy. ", "Awful pain. ", [{"role": "user", "content": "Great joy."}]], ["ok"] * 3
    ).total.tolist()
    assert happy > 0 > sad
    assert chat > 0


def test_a_missing_vader_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(RewardError, match=r"pip install 'ppo_lab\[vader\]'"):
        build_reward(VaderReward(), device="cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "ppo_lab[vader]" in problems(VaderReward())[0]


# ---- functions


def test_a_function_is_called_as_trl_calls_it(functions: ModuleType) -> None:
    """R-01."""
    seen: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        seen.update(kwargs, prompts=prompts, completions=completions)
        return [len(c) * f for c, f in zip(completions, kwargs["factor"], strict=True)]

    scorer = function_reward(functions, reward, kwargs={"bonus": 7})
    scores = scorer(["p", "q"], ["a", "bb"], factor=[1, 10], completion_ids=[[1], [2]])
    assert scores.total.tolist() == [1.0, 20.0]
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["a", "bb"],
        "factor": [1, 10],
        "completion_ids": [[1], [2]],
        "bonus": 7,
    }


@pytest.mark.parametrize("kind", ["instance", "partial", "method"])
def test_whatever_can_be_called_is_a_reward(functions: ModuleType, kind: str) -> None:
    """R-05."""

    class Similarity:
        def __init__(self, wanted: str) -> None:
            self.wanted = wanted

        def __call__(self, completions: list[str]) -> np.ndarray:
            return np.array([len(set(text) & set(self.wanted)) for text in completions])

    def count(letter: str, completions: list[str]) -> list[int]:
        return [text.count(letter) for text in completions]

    given = {
        "instance": Similarity("ab"),
        "partial": functools.partial(count, "a"),
        "method": Similarity("ab").__call__,
    }
    scores = function_reward(functions, given[kind])(["p", "q"], ["aab", "c"]).total
    assert scores.tolist() == [2.0, 0.0]


def test_a_function_may_change_what_it_is_shown(functions: ModuleType) -> None:
    def grow(prompts: list[Any], tags: list[list[str]], words: list[str]) -> list[float]:
        prompts[0].append({"role": "assistant", "content": "x"})
        tags[0].append("x")
        words.append("x")
        return [float(len(prompts[0]) + len(tags[0]) + len(words))]

    scorer, chat, tags = function_reward(functions, grow, kwargs={"words": []}), [*CHAT], ["a"]
    for _ in range(2):
        assert scorer([chat], ["yo"], tags=[tags]).total.tolist() == [5.0]
    assert (len(chat), tags) == (1, ["a"])


def test_a_column_may_have_any_name(functions: ModuleType) -> None:
    scorer = function_reward(functions, lambda completions, **columns: columns["self"])
    assert scorer(["p"], ["a"], self=[2.0]).total.tolist() == [2.0]


def test_what_a_function_lacks_is_said_before_anything_is_scored(functions: ModuleType) -> None:
    functions.reward = lambda completions, completion_ids, answer: [1.0]
    one = FunctionReward(target="rewards_of_the_test:reward")
    # A reward model of the mixture is not even looked for.
    mixed = WeightedReward(parts={"model": ModelReward(path="nobody/nothing"), "own": one})
    for section in (one, mixed):
        check_columns(section, ["answer"])
        with pytest.raises(RewardError, match="needs the argument 'answer'"):
            check_columns(section, ["label"])


def test_only_functions_that_take_the_ids_ask_for_them(functions: ModuleType) -> None:
    assert function_reward(functions, lambda completions, completion_ids: [1.0]).reads_ids
    assert function_reward(functions, lambda **columns: [1.0]).reads_ids
    assert not function_reward(functions, lambda completions: [1.0]).reads_ids


@pytest.mark.parametrize(
    ("reward", "kwargs", "message"),
    [
        (lambda prompts, completions, /: [1.0], {}, "takes 'prompts' by position alone"),
        (lambda prompts, size=1: [1.0], {"sise": 2}, r"no argument 'sise', .*mean 'size'\?"),
    ],
)
def test_a_function_that_its_arguments_do_not_fit_is_refused_before_anything_runs(
    functions: ModuleType, reward: Any, kwargs: dict[str, Any], message: str
) -> None:
    functions.reward = reward
    section = FunctionReward(target="rewards_of_the_test:reward", kwargs=kwargs)
    (problem,) = problems(section)
    assert re.search(rf"^reward\.target=rewards_of_the_test:reward: it .*{message}", problem)
    with pytest.raises(RewardError, match=message):
        build_reward(section, device="cpu")


def test_arguments_that_have_a_default_by_position_alone_are_left_alone(
    functions: ModuleType,
) -> None:
    def reward(size: float = 2.0, /, *, completions: list[str], bonus: float) -> list[float]:
        return [size + bonus for _ in completions]

    scorer = function_reward(functions, reward, kwargs={"bonus": 1.0})
    assert scorer(["p"], ["a"], size=[9.0]).total.tolist() == [3.0]


def test_a_run_asks_for_columns_before_it_loads_a_model(
    functions: ModuleType, tmp_path: Path
) -> None:
    functions.reward = lambda completions, answer: [1.0]
    own = FunctionReward(target="rewards_of_the_test:reward")
    parts = {"model": ModelReward(path="nobody/nothing"), "own": own}
    config = tiny(tmp_path, reward=WeightedReward(parts=parts))
    with pytest.raises(RewardError, match="needs the argument 'answer'"):
        build(config, tmp_path)


@pytest.mark.parametrize("kwargs", [{}, {"max_completion_len": 9, "soft_punish_cache": 3}])
def test_what_makes_a_reward_function_is_none_itself(kwargs: dict[str, Any]) -> None:
    section = FunctionReward(target="trl.rewards:get_soft_overlong_punishment", kwargs=kwargs)
    message = r"takes max_completion_len, .*, nothing of a sample .*in a module of your own"
    with pytest.raises(RewardError, match=message):
        check_columns(section, ["answer"])


def test_a_function_in_place_of_scores_is_to_be_named_itself() -> None:
    with pytest.raises(RewardError, match=r"returned builtin_function.*in a module of your own"):
        checked_scores("r", len, ["p"], ["a"])
    with pytest.raises(RewardError, match=r"one number a sample\.$"):
        checked_scores("r", 1.0, ["p"], ["a"])


def test_trls_own_reward_functions_work_as_they_are() -> None:
    section = FunctionReward(target="trl.rewards:think_format_reward")
    reward = build_reward(section, device="cpu")
    assert reward([CHAT, CHAT], ["<think>\nwhy\n</think>\nyes", "yes"]).total.tolist() == [1.0, 0.0]


def test_beside_a_chat_the_function_is_shown_a_message(functions: ModuleType) -> None:
    def reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        assert completions[0] == [{"role": "assistant", "content": "yo"}]
        assert completions[1] == "plain"
        return [1.0, 2.0]

    scores = function_reward(functions, reward)([CHAT, "text"], ["yo", "plain"])
    assert scores.total.tolist() == [1.0, 2.0]


def test_a_function_is_given_only_what_it_names(functions: ModuleType) -> None:
    scorer = function_reward(functions, lambda completions, level: level)
    assert scorer(["p"], ["a"], level=[5], other=[1]).parts["mine"].tolist() == [5.0]


def test_a_needed_argument_that_is_no_column_is_named(functions: ModuleType) -> None:
    scorer = function_reward(functions, lambda completions, answer: [1.0])
    with pytest.raises(
        RewardError, match=r"needs the argument 'answer'.*completions, label, prompts"
    ):
        scorer(["p"], ["a"], label=[1])


def test_none_in_an_array_is_one_in_a_list(functions: ModuleType) -> None:
    answer = np.array([1.0, None], dtype=object)
    scorer = function_reward(functions, lambda completions: answer, none_score=-1.0)
    assert scorer(["p", "q"], ["a", "b"]).total.tolist() == [1.0, -1.0]


def test_none_means_not_applicable(functions: ModuleType) -> None:
    """R-06."""

    def reward(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if c == "skip" else 1.0 for c in completions]

    assert function_reward(functions, reward)(["p"] * 2, ["skip", "x"]).total.tolist() == [0.0, 1.0]
    scorer = function_reward(functions, reward, none_score=-2.0)
    assert scorer(["p"] * 2, ["skip", "x"]).total.tolist() == [-2.0, 1.0]


def test_a_batch_of_none_alone_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    answers = [[1.0, None], [None, None], [None, None]]
    scorer = FunctionScorer(lambda prompts: answers.pop(0), name="mine:empty", none_score=-1.0)
    assert scorer(["a", "b"], ["c", "d"]) == [1.0, -1.0]
    assert not caplog.records
    for _ in range(2):
        assert scorer(["a", "b"], ["c", "d"]) == [-1.0, -1.0]
    (record,) = caplog.records
    assert "mine:empty returned None for all 2 samples" in record.getMessage()


def test_an_error_names_the_sample_on_which_the_function_raises(functions: ModuleType) -> None:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [1 / len(c) for c in completions]

    scorer = function_reward(functions, reward)
    with pytest.raises(
        RewardError, match=r"sample 2 .*completion ''\).*ZeroDivisionError: division"
    ) as error:
        scorer(["p"] * 4, ["a", "b", "", "d"])
    assert isinstance(error.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("timeout", [0.0, 5.0])
def test_a_function_that_ends_the_program_is_an_error_like_others(
    functions: ModuleType, timeout: float
) -> None:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        if "" in completions:
            sys.exit(3)
        return [1.0] * len(completions)

    scorer = function_reward(functions, reward, timeout=timeout)
    with pytest.raises(RewardError, match=r"sample 1 .*it called sys\.exit\(3\)"):
        scorer(["p"] * 3, ["a", "", "b"])


def test_a_process_that_a_function_forks_does_not_go_on_as_a_second_run() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[0, 3, 0, 1, 1]\n" * 3, done.stderr
    assert done.stderr.count("ValueError: of the child") == 3


FORKING = """
import os, sys
from ppo_lab.rewards.function import FunctionScorer

def fail():
    raise ValueError("of the child")

def plain(does):
    if not (child := os.fork()):
        does()
        return [0.0]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]

async def asked(does):
    return plain(does)

DONE = (int, lambda: sys.exit(3), sys.exit, lambda: sys.exit("why"), fail)

for function, timeout in ((plain, 0), (plain, 30), (asked, 0)):
    scorers = [
        FunctionScorer(function, name="forking", timeout=timeout, kwargs={"does": does})
        for does in DONE
    ]
    print([scorer._once({})[0] for scorer in scorers], flush=True)
"""


def test_a_run_that_is_asked_to_stop_while_it_scores_is_no_error(functions: ModuleType) -> None:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        raise Preempted("SIGTERM")

    with pytest.raises(Preempted):
        function_reward(functions, reward)(["p"], ["a"])


def test_an_error_of_the_batch_alone_is_told_as_such(functions: ModuleType) -> None:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        if len(completions) > 1:
            raise KeyError("too many")
        return [1.0]

    with pytest.raises(RewardError, match=r"on none of them alone\): KeyError: 'too many'"):
        function_reward(functions, reward)(["p"] * 2, ["a", "b"])


def test_a_function_that_hangs_is_given_up(functions: ModuleType) -> None:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        time.sleep(3)
        return [1.0]

    start = time.perf_counter()
    with pytest.raises(RewardError, match=r"no answer within 0\.1 s \(reward\.timeout\)"):
        function_reward(functions, reward, timeout=0.1)(["p"], ["a"])
    assert time.perf_counter() - start < 2


def test_an_async_function_is_awaited_on_one_loop_without_gradients(functions: ModuleType) -> None:
    """As TRL does: an asynchronous client that is kept open is bound to its loop."""
    weight, loops = torch.ones((), requires_grad=True), []

    async def judge(text: str) -> float:
        await asyncio.sleep(0.001)
        assert not (weight * 2).requires_grad
        return float(len(text))

    class Judge:
        async def __call__(self, completions: list[str], scale: float) -> list[float]:
            loops.append(asyncio.get_running_loop())
            return [scale * x for x in await asyncio.gather(*map(judge, completions))]

    scorer = function_reward(functions, Judge(), kwargs={"scale": 2.0})
    assert scorer(["p"] * 2, ["a", "bcd"]).total.tolist() == [2.0, 6.0]
    assert scorer(["p"], [""]).total.tolist() == [0.0]
    assert loops[0] is loops[1]

    async def within_a_loop() -> list[float]:  # as in a notebook
        return scorer(["p"], ["ab"]).total.tolist()

    assert asyncio.run(within_a_loop()) == [4.0]


def test_an_async_function_that_fails_or_hangs_leaves_the_loop_to_others(
    functions: ModuleType,
) -> None:
    ended = []

    async def reward(completions: list[str]) -> list[float]:
        if completions == ["exit"]:
            sys.exit(3)
        if completions == ["own"]:
            raise TimeoutError("the judge did not answer")
        if completions == ["hang"]:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.append(True)
                raise
        return [1.0 / len(c) for c in completions]

    scorer = function_reward(functions, reward, timeout=0.5)
    for wrong, said in (
        (["a", ""], r"sample 1 .*ZeroDivisionError"),
        (["exit"], r"it called sys\.exit\(3\)"),
        (["own"], "the judge did not answer"),
        (["hang"], r"no answer within 0\.5 s"),
    ):
        with pytest.raises(RewardError, match=said):
            scorer(["p"] * len(wrong), wrong)
        assert scorer(["p"], ["ab"]).total.tolist() == [0.5]
    assert ended == [True]


def test_a_time_limit_hands_on_results_and_errors() -> None:
    assert within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(5, lambda: {}["x"])


def test_a_failing_function_is_tried_again(functions: ModuleType) -> None:
    calls: list[float] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        calls.append(time.perf_counter())
        if len(calls) < 3:
            raise ConnectionError("busy")
        return [4.0]

    scorer = function_reward(functions, reward, retries=2, retry_wait=0.02)
    assert scorer(["p"], ["a"]).total.tolist() == [4.0]
    assert calls[2] - calls[1] > calls[1] - calls[0] > 0.015
    calls.clear()
    with pytest.raises(RewardError, match="ConnectionError: busy"):
        function_reward(functions, reward, retries=1, retry_wait=0.0)(["p"], ["a"])


def test_no_gradient_is_recorded_in_a_function(functions: ModuleType) -> None:
    """P-06."""
    weight = torch.ones((), requires_grad=True)

    def reward(completions: list[str], **kwargs: Any) -> torch.Tensor:
        assert not (weight * 2).requires_grad
        return weight.expand(len(completions))

    assert function_reward(functions, reward, timeout=5)(["p"], ["a"]).total.tolist() == [1.0]


@pytest.mark.parametrize("timeout", [0, 5])
@pytest.mark.parametrize(
    ("write", "read"),
    [
        (lambda: torch.set_default_device("meta"), lambda: torch.zeros(1).device.type),
        (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
        (lambda: torch.set_num_threads(torch.get_num_threads() + 1), torch.get_num_threads),
        (
            lambda: torch.use_deterministic_algorithms(True),
            torch.are_deterministic_algorithms_enabled,
        ),
        (
            lambda: torch.set_autocast_enabled("cpu", True),
            lambda: torch.is_autocast_enabled("cpu"),
        ),
    ],
)
def test_what_a_function_sets_for_all_of_torch_does_not_reach_training(
    functions: ModuleType, write: Any, read: Any, timeout: float
) -> None:
    before, inside = read(), []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        write()
        inside.append(read())
        return [1.0] * len(completions)

    assert function_reward(functions, reward, timeout=timeout)(["p"], ["a"]).total.tolist() == [1.0]
    assert inside != [before]
    assert read() == before


def test_a_wrong_return_of_a_function_names_the_reward(functions: ModuleType) -> None:
    scorer = function_reward(functions, lambda completions: ["good"] * len(completions))
    with pytest.raises(RewardError, match=r"^reward 'mine': the score of sample 0"):
        scorer(["p"], ["a"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", r"name the function, as package\.module:callable"),
        ("math.sqrt", r"name a function as package\.module:callable"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("math:squirt", r"math has no 'squirt'\. Did you mean 'sqrt'"),
        ("math:pi", "it is float, not a function"),
        ("collections:Counter", "it is a class; name an instance of it"),
        ("./rewards/my.py:f", r"without a path, my:f, and start in the folder it lies in"),
        ("rewards\\my.py:f", r"without a path, my:f, and"),
        ("my.py:f", r"without a path, my:f, and"),
        ("..rewards.my:f", r"without a path, rewards\.my:f, and"),
    ],
)
def test_a_target_that_is_no_function_is_refused_before_anything_runs(
    target: str, message: str
) -> None:
    (problem,) = problems(FunctionReward(target=target))
    assert problem.startswith("reward.target")
    assert re.search(message, problem)
    if target:
        with pytest.raises(RewardError, match=message):
            build_reward(FunctionReward(target=target), device="cpu")


def test_a_module_that_breaks_on_import_is_told_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "breaks_on_import.py").write_text("import a_missing_friend\n")
    (tmp_path / "raises_on_import.py").write_text("raise RuntimeError('boom')\n")
    (tmp_path / "fine_in_cwd.py").write_text("def f(completions):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert (
        "No module named 'a_missing_friend'"
        in problems(FunctionReward(target="breaks_on_import:f"))[0]
    )
    assert "RuntimeError: boom" in problems(FunctionReward(target="raises_on_import:f"))[0]
    assert problems(FunctionReward(target="fine_in_cwd:f")) == []


def test_checking_a_reward_loads_nothing_heavy() -> None:
    code = (
        "import sys; from ppo_lab.rewards import problems; from ppo_lab.config import *\n"
        "import ppo_lab.config as c\n"
        "print(problems(c.WeightedReward(parts={'a': c.FunctionReward(target='math:sqr')})))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "reward.parts.a.target=math:sqr" in done.stdout


# ---- reward models


def byte_tokenizer(*, pad: bool = True, template: str = "") -> PreTrainedTokenizerFast:
    vocab = {
        c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "<pad>"])
    }
    backend = Tokenizer(token_models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = {"eos_token": "<s>", **({"pad_token": "<pad>"} if pad else {})}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template or None
    return tokenizer


def tiny_classifier(kind: str, *, pad: int | None = 257, labels: int = 1) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "pad_token_id": pad, "num_labels": labels, "eos_token_id": 256}
    config = {
        "llama": lambda: LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            **sizes,
        ),
        "bloom": lambda: BloomConfig(hidden_size=16, n_layer=2, n_head=2, **sizes),
        "mpt": lambda: MptConfig(d_model=16, n_layers=2, n_heads=2, max_seq_len=64, **sizes),
        "gpt2": lambda: GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **sizes),
        "bert": lambda: BertConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            **sizes,
        ),
        "xlnet": lambda: XLNetConfig(d_model=16, d_inner=16, n_layer=2, n_head=2, **sizes),
        "fnet": lambda: FNetConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, **sizes
        ),
    }[kind]()
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


PROMPTS = ["a", "a longer prompt", "mid", "x"]
COMPLETIONS = ["b", " and a far longer completion", "", "yz"]


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2", "bert", "xlnet"])
@pytest.mark.parametrize("pad", [257, 256, None, -1], ids=["pad", "pad=eos", "none", "-1"])
def test_a_score_depends_on_its_own_text_alone(kind: str, pad: int | None) -> None:
    """N-30."""
    scorer = Classifier(
        tiny_classifier(kind, pad=pad), byte_tokenizer(pad=pad == 257), batch_size=3
    )
    together = scorer(PROMPTS, COMPLETIONS)
    alone = torch.cat([scorer([p], [c]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    torch.testing.assert_close(together, alone)
    assert together.unique().numel() == len(PROMPTS)


def test_an_encoder_that_padding_moves_reads_texts_one_by_one_or_not_at_all() -> None:
    model, tokenizer = tiny_classifier("fnet"), byte_tokenizer()
    with pytest.raises(RewardError, match=r"FNetFor.* when it is padded.*reward\.batch_size=1"):
        Classifier(model, tokenizer, batch_size=2)
    scorer = Classifier(model, tokenizer, batch_size=1)
    assert scorer(PROMPTS, COMPLETIONS)[0] == scorer(PROMPTS[:1], COMPLETIONS[:1])[0]


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_the_score_is_read_at_the_last_token(kind: str) -> None:
    """R-02, R-04: a raw logit, of the text in the reward model's own tokens."""
    model, tokenizer = tiny_classifier(kind, pad=None), byte_tokenizer(pad=False)
    ids = torch.tensor(
        [tokenizer("a longer prompt and a far longer completion")["input_ids"] + [256]]
    )
    expected = model.eval()(ids).logits[0, 0]
    torch.testing.assert_close(Classifier(model, tokenizer)(PROMPTS, COMPLETIONS)[1], expected)


def test_a_tokenizer_of_its_own_reads_what_the_model_is_shown(tmp_path: Path) -> None:
    """R-02: and not the one that lies beside the model."""
    model = tiny_classifier("llama")
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    words = Tokenizer(token_models.WordLevel({"a": 0, "b": 1, "<s>": 2}, unk_token="b"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<s>", pad_token="<s>")
    own.save_pretrained(tmp_path / "words")
    path, tokenizer = str(tmp_path / "model"), str(tmp_path / "words")
    reward = build_reward(ModelReward(path=path, tokenizer=tokenizer), device="cpu")
    beside = build_reward(ModelReward(path=path), device="cpu")
    texts = ["a b"], [" a"]
    torch.testing.assert_close(reward(*texts).total, Classifier(model, own)(*texts))
    assert reward(*texts).total != beside(*texts).total


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_reward_model_records_no_gradient(kind: str) -> None:
    """P-06: not even through inputs or weights that ask for one."""
    scorer, seen = Classifier(tiny_classifier(kind), byte_tokenizer()), []
    block = next(m for m in scorer.model.modules() if isinstance(m, torch.nn.Embedding))
    block.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    block.requires_grad_(True)
    assert not scorer(PROMPTS, COMPLETIONS).requires_grad
    assert seen
    assert not any(seen)


def test_the_last_tokens_are_the_ones_that_a_long_text_keeps() -> None:
    scorer = Classifier(tiny_classifier("llama"), byte_tokenizer(), max_length=8)
    first, second = scorer(["a quite different one", "some prompt"], ["the same", "the same"])
    assert first == second != scorer(["a"], ["the sane"])[0]


def test_what_the_tokenizer_puts_before_a_long_text_stays_and_counts() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    scorer = Classifier(tiny_classifier("llama"), tokenizer, max_length=8, append_eos="never")
    kept = tokenizer("letters", add_special_tokens=False)["input_ids"]
    assert scorer._encode("a prompt, and seven ", "letters") == [256, *kept]


@pytest.mark.parametrize("kind", ["gpt2", "mpt"])
def test_the_models_own_limit_holds_where_none_is_set(kind: str) -> None:
    scorer = Classifier(tiny_classifier(kind), byte_tokenizer())
    assert scorer.max_length == 64
    assert scorer(["x" * 500], ["y"]).isfinite().all()


def test_a_text_that_would_be_read_by_the_angles_of_a_batch_is_cut_before() -> None:
    model = tiny_classifier("llama")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model.config.rope_parameters, model.config.max_position_embeddings = rope, 32
    assert Classifier(model, byte_tokenizer()).max_length == 32
    with pytest.raises(RewardError, match=r"reward\.max_length=33: .*use at most 32"):
        Classifier(model, byte_tokenizer(), max_length=33)


def test_the_real_reward_model_ranks_held_stories(assets: Path) -> None:
    section = ModelReward(path=str(assets / "stories260K-vader-rm"))
    lines = (assets / "data" / "story_preferences.jsonl").read_text().splitlines()[-200:]
    rows = [json.loads(line) for line in lines]
    prompts = [row["prompt"] for row in rows]
    reward = build_reward(section, device="cpu")
    chosen = reward(prompts, [row["chosen"] for row in rows]).total
    rejected = reward(prompts, [row["rejected"] for row in rows]).total
    assert (chosen > rejected).float().mean() > 0.95


def test_eos_is_appended_as_in_training_unless_told_otherwise(assets: Path) -> None:
    folder = str(assets / "stories260K-vader-rm")
    model, tokenizer = load_classifier(folder), load_reward_tokenizer(folder)
    scores = {
        choice: Classifier(model, tokenizer, append_eos=choice)(["Once"], [" there was a cat."])
        for choice in ("auto", "always", "never")
    }
    ids = [*tokenizer("Once there was a cat.")["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        torch.testing.assert_close(scores["auto"], model(torch.tensor([ids])).logits[0])
    assert scores["auto"] == scores["always"] != scores["never"]


ENDED = "{% for m in messages %}|{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
@pytest.mark.parametrize("pad", [256, 257])  # EOS, and a token of its own
@pytest.mark.parametrize("chat", [False, True])
def test_a_decoder_s_head_reads_what_transformers_reads(kind: str, pad: int, chat: bool) -> None:
    model, tokenizer = tiny_classifier(kind, pad=pad).eval(), byte_tokenizer(pad=pad == 257)
    tokenizer.chat_template = ENDED if chat else None
    prompt: Any = [{"role": "user", "content": "ab"}] if chat else "ab"
    answers = ["c", " d e", "fgh"]
    ids = [
        tokenizer(f"|ab<s>|{a}<s>" if chat else f"ab{a}<s>", add_special_tokens=False).input_ids
        for a in answers
    ]
    with torch.no_grad():
        wanted = [model(torch.tensor([row])).logits.item() for row in ids]
    scorer = Classifier(model, tokenizer)
    torch.testing.assert_close(scorer([prompt] * 3, answers), torch.tensor(wanted))
    ended = Classifier(model, tokenizer, append_eos="always")([prompt] * 3, answers)
    assert torch.equal(ended, scorer([prompt] * 3, answers)) == (pad == 257)


def test_a_tokenizer_that_ends_texts_with_the_token_that_pads_is_read_before_it() -> None:
    model, tokenizer = tiny_classifier("llama", pad=256), byte_tokenizer(pad=False)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <s>", special_tokens=[("<s>", 256)]
    )
    with torch.no_grad():
        wanted = model(torch.tensor([tokenizer("abc").input_ids])).logits[0]
    torch.testing.assert_close(Classifier(model, tokenizer)(["ab"], ["c"]), wanted)


@pytest.mark.parametrize("closes", [False, True])
def test_a_vocabulary_without_small_letters_is_not_taken_to_close_its_texts(closes: bool) -> None:
    vocab = {token: i for i, token in enumerate(["<pad>", "<unk>", "<s>", *"ACGT"])}
    backend = Tokenizer(token_models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if closes:
        backend.post_processor = processors.TemplateProcessing(
            single="$A <s>", special_tokens=[("<s>", 2)]
        )
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    model = tiny_classifier("llama", pad=0)
    scorer = Classifier(model, tokenizer)
    assert scorer.append_eos != closes
    with torch.no_grad():
        wanted = model(torch.tensor([[3, 4, 5, 2]])).logits[0]
    torch.testing.assert_close(scorer(["AC"], ["G"]), wanted)


def pair_tokenizer(*, limit: int = 10**30) -> PreTrainedTokenizerFast:
    """A byte tokenizer that separates two texts as BERT's does."""
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <s>", pair="<s> $A <s> $B:1 <s>:1", special_tokens=[("<s>", 256)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.model_max_length = limit
    return tokenizer


def test_an_encoder_reads_prompt_and_response_as_two_texts_where_asked() -> None:
    model, tokenizer = tiny_classifier("bert").eval(), pair_tokenizer()
    prompts: list[Any] = ["What is it?", CHAT, "a"]
    answers = ["it", "a longer answer", ""]
    with torch.no_grad():
        wanted = [
            model(**tokenizer(p, a, return_tensors="pt")).logits.item()
            for p, a in zip(["What is it?", "hi", "a"], answers, strict=True)
        ]
    scores = Classifier(model, tokenizer, text="pair")(prompts, answers)
    torch.testing.assert_close(scores, torch.tensor(wanted))
    assert (scores != Classifier(model, tokenizer)(prompts, answers))[:2].all()


def test_of_two_texts_that_are_too_long_the_beginning_of_the_first_is_cut() -> None:
    scorer = Classifier(tiny_classifier("bert"), pair_tokenizer(limit=10), text="pair")
    letters = dict(zip("abcdefghij", scorer.tokenizer("abcdefghij")["input_ids"][1:], strict=False))

    def written(first: str, second: str) -> str:
        names = {256: "|", **{i: c for c, i in letters.items()}}
        return "".join(names[i] for i in scorer._read(first, second).ids)

    assert written("abcd", "efg") == "|abcd|efg|"
    assert written("abcdefg", "hij") == "|defg|hij|"
    assert written("abc", "abcdefgh") == "|abc|efgh|"  # the second leaves the first no room
    assert scorer._read("abcdefg", "hij").kinds == [0] * 6 + [1] * 4


def test_two_texts_are_refused_where_nothing_separates_them() -> None:
    with pytest.raises(RewardError, match="puts nothing between two texts"):
        Classifier(tiny_classifier("llama"), byte_tokenizer(), text="pair")
    section = ModelReward(path="a/b", text="pair", chat_template="always", append_eos="always")
    assert [line.partition(":")[0] for line in problems(section)] == [
        "reward.chat_template=always",
        "reward.append_eos=always",
    ]


def test_an_encoder_gets_no_eos_of_ours() -> None:
    assert not Classifier(tiny_classifier("bert"), byte_tokenizer()).append_eos


def test_a_label_is_found_by_name_or_number() -> None:
    model = tiny_classifier("llama", labels=2)
    model.config.id2label = {0: "NEGATIVE", 1: "POSITIVE"}
    by_name, by_number, other = (
        Classifier(model, byte_tokenizer(), label=label)(PROMPTS, COMPLETIONS)
        for label in ("positive", "1", "0")
    )
    assert torch.equal(by_name, by_number)
    assert not torch.equal(by_name, other)
    with pytest.raises(
        RewardError, match=r"several outputs; name one of 0 \(NEGATIVE\), 1 \(POSITIVE\)"
    ):
        Classifier(model, byte_tokenizer())
    with pytest.raises(RewardError, match=r"reward\.label=good: .* no such output"):
        Classifier(model, byte_tokenizer(), label="good")


def test_a_label_s_name_goes_before_its_number() -> None:
    ratings = SimpleNamespace(id2label={0: "-1", 1: "0", 2: "1"})
    assert [label_index(ratings, label) for label in ("-1", "0", "1", "2")] == [0, 1, 2, 2]
    stars = SimpleNamespace(id2label={0: "1", 1: "2", 2: "3"})
    assert [label_index(stars, label) for label in ("0", "1", "2", "3")] == [0, 0, 1, 2]


@pytest.mark.parametrize("labels", [1, 3])
def test_probabilities_can_be_read_instead_of_logits(labels: int) -> None:
    def scores(output: str) -> torch.Tensor:
        model = tiny_classifier("llama", labels=labels)
        return Classifier(model, byte_tokenizer(), label="0", output=output)(PROMPTS, COMPLETIONS)

    torch.testing.assert_close(scores("log_probability").exp(), scores("probability"))
    if labels == 1:
        torch.testing.assert_close(scores("logit").sigmoid(), scores("probability"))
    else:
        assert ((scores("probability") > 0) & (scores("probability") < 1)).all()


def test_the_probability_of_one_of_several_labels_at_once_is_its_own() -> None:
    def scores(output: str) -> torch.Tensor:
        model = tiny_classifier("bert", labels=3)
        model.config.problem_type = "multi_label_classification"
        return Classifier(model, byte_tokenizer(), label="1", output=output)(PROMPTS, COMPLETIONS)

    torch.testing.assert_close(scores("probability"), scores("logit").sigmoid())
    torch.testing.assert_close(scores("log_probability"), scores("logit").sigmoid().log())


def test_dropout_is_off_and_nothing_is_trained() -> None:
    model = tiny_classifier("bloom").train()
    model.config.hidden_dropout = 0.5
    scorer = Classifier(model, byte_tokenizer())
    assert torch.equal(scorer(["a"], ["b"]), scorer(["a"], ["b"]))
    assert not any(p.requires_grad for p in model.parameters())


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_chats_are_scored_through_the_reward_models_own_template() -> None:
    tokenizer = byte_tokenizer(template=TEMPLATE)
    model = tiny_classifier("llama")
    text = torch.tensor([tokenizer("<user>hi<assistant>yo")["input_ids"]])
    expected = model.eval()(text).logits[0]
    torch.testing.assert_close(Classifier(model, tokenizer)([CHAT], ["yo"]), expected)
    always = Classifier(model, tokenizer, chat_template="always")
    torch.testing.assert_close(always(["hi"], ["yo"]), expected)


def test_a_template_that_writes_the_day_writes_one_day_for_a_reward_too() -> None:
    tokenizer = byte_tokenizer(template="{{ strftime_now( '%Y-%m-%d' ) }}" + TEMPLATE)
    model = tiny_classifier("llama")
    with torch.no_grad():
        text = torch.tensor([tokenizer("2024-07-26<user>hi<assistant>yo")["input_ids"]])
        expected = model.eval()(text).logits[0]
    torch.testing.assert_close(Classifier(model, tokenizer)([CHAT], ["yo"]), expected)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "none"}
    torch.testing.assert_close(Classifier(model, tokenizer)([CHAT], ["yo"]), expected)
    assert "strftime_now" in tokenizer.chat_template["default"]  # as it is saved


def test_a_template_that_refuses_a_chat_is_an_error_with_the_chat() -> None:
    refusing = "{{ raise_exception('System role not supported') }}"
    scorer = Classifier(tiny_classifier("llama"), byte_tokenizer(template=refusing))
    with pytest.raises(RewardError, match=r"refuses .*'hi'.*: System role not supported; reward"):
        scorer([CHAT], ["yo"])


def test_a_template_is_tried_on_all_orders_of_roles_before_anything_is_scored(
    tmp_path: Path,
) -> None:
    gemma = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{{ m['content'] }}"
        "{% endfor %}"
    )
    tiny_classifier("llama").save_pretrained(tmp_path)
    byte_tokenizer(template=gemma).save_pretrained(tmp_path)
    prompts = ["a text", CHAT, CHAT, [{"role": "system", "content": "Be kind."}, *CHAT]]
    for choice in ("auto", "never"):
        section = ModelReward(path=str(tmp_path), chat_template=choice)
        reward = build_reward(WeightedReward(parts={"model": section}), device="cpu")
        reward.check_prompts(prompts[:3])
        if choice == "auto":
            with pytest.raises(RewardError, match=r"refuses .*Be kind.*: System role not"):
                reward.check_prompts(prompts)
        else:
            reward.check_prompts(prompts)


def test_a_run_tries_a_reward_model_s_template_before_it_samples(tmp_path: Path) -> None:
    refusing = byte_tokenizer(template="{{ raise_exception('no texts of one message') }}")
    tiny_classifier("llama").save_pretrained(tmp_path / "reward")
    refusing.save_pretrained(tmp_path / "reward")
    section = ModelReward(path=str(tmp_path / "reward"), chat_template="always")
    with pytest.raises(RewardError, match=r"refuses .*: no texts of one message"):
        build(tiny(tmp_path, reward=section), tmp_path)


def test_a_reward_model_without_template_reads_a_chat_as_plain_text() -> None:
    scorer = Classifier(tiny_classifier("llama"), byte_tokenizer())
    torch.testing.assert_close(scorer([CHAT], ["yo"]), scorer(["hi\n"], ["yo"]))
    with pytest.raises(RewardError, match="chat_template=always"):
        Classifier(tiny_classifier("llama"), byte_tokenizer(), chat_template="always")


def test_only_the_completion_is_read_on_request() -> None:
    scorer = Classifier(tiny_classifier("llama"), byte_tokenizer(), text="completion")
    assert torch.equal(scorer(["one"], ["yo"]), scorer(["another"], ["yo"]))


def test_empty_texts_have_a_score() -> None:
    scorer = Classifier(tiny_classifier("llama"), byte_tokenizer(), append_eos="never")
    assert scorer(["", "a"], ["", "b"]).isfinite().all()


def test_texts_beyond_learned_positions_are_refused() -> None:
    model = tiny_classifier("bert")  # 64 positions
    with pytest.raises(RewardError, match=r"has positions for 64 tokens; use at most 64, or 0"):
        Classifier(model, byte_tokenizer(), max_length=65)
    Classifier(model, byte_tokenizer(), max_length=64)
    Classifier(tiny_classifier("llama"), byte_tokenizer(), max_length=10**5)
    with pytest.raises(RewardError, match=r"reward\.max_length=65: .*use at most 64"):
        Classifier(tiny_classifier("mpt"), byte_tokenizer(), max_length=65)
    shorter = byte_tokenizer()
    shorter.model_max_length = 32  # cuts where nothing is asked, and is no bound of the model's
    assert Classifier(model, shorter).max_length == 32
    assert Classifier(model, shorter, max_length=64)(["x" * 80], ["y"]).isfinite().all()


def test_a_tokenizer_of_another_model_is_refused(assets: Path) -> None:
    model = load_classifier(str(assets / "stories260K-vader-rm"))
    with pytest.raises(RewardError, match="the tokenizer has 600 tokens, the reward model 512"):
        tokenizer = load_reward_tokenizer(str(assets / "stories260K-vader-rm"))
        tokenizer.add_tokens([f"<x{i}>" for i in range(88)])
        Classifier(model, tokenizer)


def test_a_model_without_a_trained_head_is_refused(assets: Path) -> None:
    with pytest.raises(
        RewardError, match=r"no trained sequence classifier; its weights lack score\.weight"
    ):
        load_classifier(str(assets / "stories260K"))


@pytest.mark.parametrize("path", ["nobody/nothing", "./no_such_folder", "/tmp"])
def test_a_reward_model_that_cannot_be_had_says_so_in_one_paragraph(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"^reward\.path={path}: ") as error:
        build_reward(ModelReward(path=path), device="cpu")
    assert "\n" not in str(error.value)


def test_folders_are_checked_before_any_weight_is_loaded(tmp_path: Path, assets: Path) -> None:
    def found(path: str) -> list[str]:
        return problems(ModelReward(path=path))

    assert found(str(assets / "stories260K-vader-rm")) == []
    assert found("lvwerra/distilbert-imdb") == []
    assert "name the reward model" in found("")[0]
    assert "no such folder" in found("./nowhere")[0]
    assert "no config.json" in found(str(tmp_path))[0]
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "this is an adapter" in found(str(tmp_path))[0]


def test_a_saved_classifier_loads_from_its_folder(tmp_path: Path) -> None:
    model, tokenizer = tiny_classifier("gpt2"), byte_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = Classifier(model, tokenizer)(PROMPTS, COMPLETIONS)
    reward = build_reward(ModelReward(path=str(tmp_path), weight=2.0), device="cpu")
    torch.testing.assert_close(reward(PROMPTS, COMPLETIONS).total, 2 * expected)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<s>"


def test_prompt_and_response_stand_side_by_side() -> None:
    assert joined("Once", " upon") == "Once upon"
    assert joined(CHAT, "yo") == "hi\nyo"
