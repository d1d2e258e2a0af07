"""A Python function as a reward, called as TRL calls reward functions."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import logging
import os
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ppo_lab.rewards.conversation import answer, is_chat
from ppo_lab.rewards.scoring import RewardError, describe
from ppo_lab.rewards.targets import TargetError, find_target, keywords, parameters

log = logging.getLogger(__name__)


def function_scorer(section: Any, *, device: str) -> FunctionScorer:
    """The function at `target`, with the section's keyword arguments, time limit and further
    attempts.

    Raises:
        RewardError: there is no such function, or it cannot be called with these arguments.
    """
    try:
        function = find_target(section.target, list(section.kwargs))
    except TargetError as error:
        raise RewardError(f"reward.target={section.target}: {error}") from error
    return FunctionScorer(
        function,
        name=section.target,
        kwargs=dict(section.kwargs),
        none_score=section.none_score,
        timeout=section.timeout,
        retries=section.retries,
        retry_wait=section.retry_wait,
    )


class FunctionScorer:
    """Scores by a function of keywords: `prompts`, `completions` and every column of the data set.

    Where a prompt is a chat, its completion is shown as a list with the assistant's message. A
    function that does not take arbitrary keywords (`**kwargs`) is given only those it names. None
    among its scores means "not applicable" and becomes `none_score`; a batch of nothing else is
    warned of, once. It is called without gradients, once a batch. An async function is awaited, on
    one event loop for all batches, to which what it keeps open may be bound.

    `retries` further attempts follow when it raises; `timeout` seconds (0 = no limit) hold for each
    attempt, and one that exceeds them is left behind in its thread, since Python cannot stop it; an
    async one is cancelled.
    """

    # It may count its calls, draw random numbers, or compare the samples of a batch.
    sees_whole_batch = True

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str,
        kwargs: dict[str, Any] | None = None,
        none_score: float = 0.0,
        timeout: float = 0.0,
        retries: int = 0,
        retry_wait: float = 1.0,
    ) -> None:
        """A scorer that calls `function`; `name` is what messages call it."""
        self.function = function
        self.name = name
        self.kwargs = kwargs or {}
        self.none_score = none_score
        self.timeout = timeout
        self.retries = retries
        self.retry_wait = retry_wait
        self._warned = False

    def __call__(self, /, prompts: list[Any], completions: list[str], **columns: list[Any]) -> Any:
        """What the function returns, None replaced; not yet checked for number and kind.

        Raises:
            RewardError: it raised, took too long, or needs an argument that the data does not have.
        """
        shown = [answer(c) if is_chat(p) else c for p, c in zip(prompts, completions, strict=True)]
        arguments = {"prompts": prompts, "completions": shown, **columns}
        self.check_columns(arguments)
        try:
            scores = self._attempts(arguments)
        except TimeoutError as error:
            raise RewardError(f"reward function {self.name}: {error}") from error
        except Exception as error:
            where = self._culprit(arguments, prompts, completions)
            reason = f"{type(error).__name__}: {error}"
            raise RewardError(f"reward function {self.name} raised on {where}: {reason}") from error
        if str(getattr(scores, "dtype", "")) == "object":  # an array that holds None
            scores = list(scores)
        if isinstance(scores, (list, tuple)):
            self._warn_of_none_alone(scores)
            return [self.none_score if score is None else score for score in scores]
        return scores

    def _warn_of_none_alone(self, scores: Sequence[Any]) -> None:
        """Say once that a whole batch got no score: mostly a function that forgets to return it."""
        if self._warned or not scores or any(score is not None for score in scores):
            return
        self._warned = True
        log.warning(
            "reward function %s returned None for all %d samples of a batch; each counts as "
            "none_score=%g",
            self.name,
            len(scores),
            self.none_score,
        )

    def _attempts(self, arguments: dict[str, Any]) -> Any:
        """One call, and more with growing waits while the function raises."""
        if not self.retries:
            return self._once(arguments)
        from tenacity import Retrying, stop_after_attempt, wait_exponential

        wait = wait_exponential(multiplier=self.retry_wait, max=max(60.0, self.retry_wait))
        stop = stop_after_attempt(self.retries + 1)
        return Retrying(stop=stop, wait=wait, reraise=True)(self._once, arguments)

    def _once(self, arguments: dict[str, Any]) -> Any:
        # Copies: what a function changes of a chat would stay in the prompts.
        accepted = copy.deepcopy({**self._accepted(arguments), **self.kwargs})

        def call() -> Any:
            with torch.no_grad(), exits_as_errors(), forks_end_here():
                return self.function(**accepted)

        with torch_as_it_was():
            found = within(self.timeout, call) if self.timeout else call()
            return awaited(found, self.timeout) if inspect.isawaitable(found) else found

    def _accepted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments that the function takes."""
        names = keywords(self.function)
        if names is None:
            return arguments
        return {name: value for name, value in arguments.items() if name in names}

    @property
    def reads_ids(self) -> bool:
        """Whether the function takes `completion_ids`, as those of TRL may."""
        return "completion_ids" in self._accepted({"completion_ids": []})

    def check_columns(self, columns: Iterable[str]) -> None:
        """Nothing, where these arguments and `kwargs` are all that the function needs.

        Raises:
            RewardError: naming the argument that the data set cannot give, or it takes none that
                differs from sample to sample.
        """
        shown = set(columns) - set(self.kwargs)
        if not self._accepted(dict.fromkeys(shown)):
            taken = ", ".join(keywords(self.function) or ["no argument"])
            raise RewardError(
                f"reward function {self.name} takes {taken}, nothing of a sample (there are: "
                f"{', '.join(sorted(shown))}); name its arguments so, or, if it makes a reward "
                "function, call it in a module of your own and name what it returns."
            )
        given = shown | set(self.kwargs)
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        for parameter in parameters(self.function):
            needed = parameter.default is parameter.empty and parameter.kind not in variadic
            if needed and parameter.name not in given:
                raise RewardError(
                    f"reward function {self.name} needs the argument {parameter.name!r}, "
                    f"which is no column of the data (there are: {', '.join(sorted(given))}) "
                    "and not in reward.kwargs."
                )

    def _culprit(
        self, arguments: dict[str, Any], prompts: list[Any], completions: list[str]
    ) -> str:
        """The first sample on which the function raises when called with it alone."""
        for i in range(len(completions)):
            one = {
                name: [value[i]]
                if isinstance(value, list) and len(value) == len(completions)
                else value
                for name, value in arguments.items()
            }
            try:
                self._once(one)
            except Exception:
                return describe(i, prompts, completions)
        return f"a batch of {len(completions)} samples (on none of them alone)"


@contextmanager
def torch_as_it_was() -> Iterator[None]:
    """What is set inside for all of torch is set back afterwards: training computes as before."""
    before = [read() for read, _ in _OF_TORCH]
    try:
        yield
    finally:
        for (read, write), value in zip(_OF_TORCH, before, strict=True):
            if read() != value:
                write(value)


def _set_default_device(device: torch.device) -> None:
    """The CPU as it is at first: by no mode, through which every call would go."""
    torch.set_default_device(None if device.type == "cpu" else device)


_OF_TORCH: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.get_default_device, _set_default_device),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (
        functools.partial(torch.is_autocast_enabled, "cpu"),
        functools.partial(torch.set_autocast_enabled, "cpu"),
    ),
    (
        functools.partial(torch.is_autocast_enabled, "cuda"),
        functools.partial(torch.set_autocast_enabled, "cuda"),
    ),
)


@contextmanager
def exits_as_errors() -> Iterator[None]:
    """What ends the program inside becomes an error like others: of several processes the rest
    would wait for this one.

    Raises:
        RuntimeError: `sys.exit` was called.
    """
    try:
        yield
    except SystemExit as error:
        if type(error) is not SystemExit:  # the run itself is asked to stop
            raise
        raise RuntimeError(f"it called sys.exit({error.code})") from error


@contextmanager
def forks_end_here() -> Iterator[None]:
    """A process that was forked inside ends where it would leave: it would go on as a second run in
    the same folder.
    """
    process, code = os.getpid(), 0
    try:
        yield
    except BaseException as error:
        if os.getpid() == process:
            raise
        code = _exit_code(error)
    finally:
        if os.getpid() != process:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            os._exit(code)


def _exit_code(error: BaseException) -> int:
    """What a process ends with that this ended, its traceback printed if it is an error."""
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        return 1
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def awaited(what: Awaitable[Any], seconds: float) -> Any:
    """What an async function returns, if it does so in time (0 = whenever it does).

    Raises:
        TimeoutError: it did not, and was cancelled.
    """

    async def without_gradients() -> Any:
        with torch.no_grad(), exits_as_errors(), forks_end_here():
            return await what

    future = asyncio.run_coroutine_threadsafe(without_gradients(), _event_loop())
    try:
        return future.result(seconds or None)
    except TimeoutError as error:
        if future.done():  # its own
            raise
        raise TimeoutError(_given_up(seconds)) from error
    finally:
        future.cancel()


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """The loop of all async rewards, in a thread of its own: in a notebook this one has another."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="ppo_lab-async-rewards").start()
    return loop


def _given_up(seconds: float) -> str:
    return f"no answer within {seconds:g} s (reward.timeout); it was given up."


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns, if it does so in time.

    Raises:
        TimeoutError: it did not; its thread is left behind and does not keep the program from
        ending.
    """
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["result"] = call()
        except BaseException as error:  # handed over to the caller's thread
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True, name="ppo_lab-reward")
    thread.start()
    thread.join(seconds)
    if "error" in outcome:
        raise outcome["error"]
    if "result" not in outcome:
        raise TimeoutError(_given_up(seconds))
    return outcome["result"]
