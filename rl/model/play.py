"""Play the episodes of a roll-out: the environments, their replies as tokens, and what the reward functions get.

A turn is a reply of the model. Its commands are called in the environment, and the texts that they return are appended
to the episode's tokens, in the form of the chat template. An episode ends with a turn without a command, when the
environment is done, after `max_turns`, and when its tokens reach `max_completion_length`.

Environments run in a thread. Replies that come within a second are waited for, so that quick environments leave a run
reproducible; once one is slower, the other rows are decoded meanwhile.
"""

import asyncio
import functools
import inspect
import math
import queue
import random
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path

from data import DataError
from data.commands import find_commands
from data.environments import (
    add_observation,
    environment_of,
    first_observation,
    has_score,
    make_environment,
    row_seed,
    tools_of,
)
from grading import Completion, RewardError, Turn, prompt_text
from grading.base import first_line, is_finite_number, reward_lock, shorten, to_number
from rl.config import Config
from rl.model.policy import Policy, Question
from rl.model.turns import plays_with_tools, render_replies

PATIENCE = 1.0  # seconds to wait for replies before other rows are decoded
MAX_REPLY = 4000  # characters of a reply; the rest is cut off


@dataclass
class Game:
    """One episode. An episode of a row without an environment has one turn."""

    question: Question
    environment: object = None
    tools: dict = field(default_factory=dict)
    random_state: tuple = ()  # of Python's `random`, one for each episode
    prompt: str | list[dict] = ""  # with the first observation
    prompt_ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    completion_prefix: str = ""  # start of the current turn that the chat template writes
    score: float | None = None
    reward: float | None = None
    error: RewardError | None = None  # with reward_errors: skip


class Play:
    """The episodes of one roll-out, by their index in it.

    Attributes:
        prompts: Token ids of the prompts, with the first observations.
        num_generations: Completions of each prompt; 1 if the first observations in a group differ.
        max_turn_length: Tokens of a turn at which the episode ends.
    """

    def __init__(self, policy: Policy, questions: list[Question], num_generations: int, config: Config, step: int):
        self.policy = policy
        self.config = config
        self._calls: queue.SimpleQueue = queue.SimpleQueue()  # for the thread: a future and its function
        self._replies: dict[int, Future] = {}  # by episode
        self._is_slow = False  # a reply has taken longer than PATIENCE
        self._called = ""  # the call in progress, for a message
        self._call_started = math.inf
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.games = []
        try:
            for question in questions:
                self.games += [self._begin(question, step) for _ in range(num_generations)]
        except BaseException:
            self.close()
            raise
        ids = [game.prompt_ids for game in self.games]
        groups = [ids[i : i + num_generations] for i in range(0, len(ids), num_generations)]
        is_equal = all(prompt == group[0] for group in groups for prompt in group)
        self.num_generations = num_generations if is_equal else 1
        self.prompts = [group[0] for group in groups] if is_equal else ids
        self.max_turn_length = config.max_turn_length or config.max_completion_length

    def _begin(self, question: Question, step: int) -> Game:
        row = question.row
        if not environment_of(row):
            prefix = question.completion_prefix
            return Game(question, prompt=row["prompt"], prompt_ids=question.prompt_ids, completion_prefix=prefix)
        seed = row_seed(row, step)
        game = Game(question, random_state=random.Random(seed).getstate())
        create = functools.partial(make_environment, row["environment"])
        game.environment = self._in_thread(lambda: self._call(game, "__init__", create))
        game.tools = tools_of(game.environment)
        reset = functools.partial(first_observation, game.environment, row | {"seed": seed})
        observation = self._in_thread(lambda: self._call(game, "reset", reset)) or ""
        game.prompt = add_observation(row["prompt"], observation)
        game.prompt_ids = question.prompt_ids
        if observation != row.get("observation"):
            game.prompt_ids = self.policy.encode_row(row | {"observation": observation})[0]
        game.completion_prefix = question.completion_prefix
        game.score = self._in_thread(lambda: self._score(game))
        return game

    # --- called by the roll-out

    def end_turn(self, index: int, ids: list[int]) -> None:
        """Let the environment answer a turn, given its token ids. `replies` returns the answer."""
        self._replies[index] = self._submit(lambda: self._answer(self.games[index], ids))

    def replies(self, block: bool) -> dict[int, list[int] | None]:
        """Return the new answers as token ids, by episode; None ends the episode.

        block: wait until there is one. Raises RewardError if an environment fails or takes too long.
        """
        deadline = time.monotonic() + (0.0 if self._is_slow else PATIENCE)
        while True:
            done, pending = wait(self._replies.values(), timeout=0)
            is_late = pending and time.monotonic() >= deadline
            if not pending or is_late and (done or not block):
                break
            wait(pending, timeout=0.05)
            self._check_time()
        self._is_slow = self._is_slow or bool(pending)
        indices = [index for index, future in self._replies.items() if future in done]
        return {index: self._replies.pop(index).result() for index in indices}

    def end_last_turn(self, index: int, ids: list[int]) -> None:
        """Record a turn that no reply follows, because the episode has reached a limit of tokens."""
        game = self.games[index]
        game.turns.append(Turn(game.completion_prefix + self.policy.decode(ids)))

    def completion(self, index: int, ids: list[int], truncated: bool, step: int) -> Completion:
        """Return the input of the reward functions for a finished episode. ids: the tokens that the model sampled."""
        game = self.games[index]
        if game.environment is not None and hasattr(game.environment, "get_reward"):
            get_reward = game.environment.get_reward
            reward = to_number(self._in_thread(lambda: self._call(game, "get_reward", get_reward)))
            if reward is not None and not is_finite_number(reward):
                self._fail(game, "get_reward", TypeError(f"returned {reward!r}, expected a finite number"))
            game.reward = reward
        return Completion(
            prompt=prompt_text(game.prompt),
            text=game.turns[-1].text if game.turns else "",
            row=game.question.row,
            tokens=len(ids),
            token_ids=ids,
            truncated=truncated,
            step=step,
            turns=game.turns if game.environment is not None else [],
            environment=game.environment,
            environment_reward=game.reward,
            error=game.error,
        )

    def close(self) -> None:
        """End the thread, once its call is over."""
        self._calls.put(None)
        self._thread.join(timeout=1.0)

    def _submit(self, function: Callable) -> Future:
        """Call a function in the thread. Calls follow each other in this order."""
        future = Future()
        self._calls.put((future, function))
        return future

    def _in_thread(self, function: Callable):
        """Return function(), called in the thread. Raises RewardError if a call takes too long."""
        future = self._submit(function)
        while not future.done():
            wait([future], timeout=0.05)
            self._check_time()
        return future.result()

    def _check_time(self) -> None:
        limit = self.config.environment_timeout
        if time.monotonic() - self._call_started > limit:
            raise RewardError(f"environment: a call of {self._called} took more than {limit:g} s (environment_timeout)")

    # --- in the thread

    def _run(self) -> None:
        while call := self._calls.get():
            future, function = call
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def _answer(self, game: Game, ids: list[int]) -> list[int] | None:
        """Record a turn and call its commands. Returns the tokens of the reply, or None if the episode is over."""
        turn = Turn(game.completion_prefix + self.policy.decode(ids))
        game.turns.append(turn)
        if game.environment is None:
            return None
        results = self._results(game, turn.text)
        score = self._score(game)
        if score is not None:
            turn.score = score - (game.score or 0.0)
            game.score = score
        turn.reply = "\n".join(results)
        if (
            not results
            or game.error
            or getattr(game.environment, "done", False)
            or len(game.turns) >= self.config.max_turns
        ):
            return None
        role = "tool" if plays_with_tools(self.policy) else "user"
        contents = results if role == "tool" else [turn.reply]
        text, game.completion_prefix = render_replies(self.policy, [{"role": role, "content": c} for c in contents])
        return self.policy.tokenizer.encode(text, add_special_tokens=False)

    def _results(self, game: Game, text: str) -> list[str]:
        """Call the commands of a turn and return what they return, or what is wrong with them."""
        completion = Completion(prompt="", text=text, row={})
        try:
            takes_bare = hasattr(game.environment, "done") and not plays_with_tools(self.policy)
            commands = find_commands(completion.answer, game.tools, takes_bare)
        except ValueError as error:
            return [str(error)]
        results = []
        for name, arguments in commands:
            if name not in game.tools:
                results.append(f"There is no command {shorten(name)}, only {', '.join(game.tools)}.")
                continue
            tool = game.tools[name]
            try:
                inspect.signature(tool).bind(**arguments)
            except TypeError as error:
                results.append(f"{name}: {error}.")
                continue
            result = self._call(game, name, functools.partial(tool, **arguments))
            results.append(str("" if result is None else result)[:MAX_REPLY])
        return results

    def _score(self, game: Game) -> float | None:
        if not has_score(game.environment):
            return None
        score = to_number(self._call(game, "score", game.environment.score))
        if not is_finite_number(score):
            self._fail(game, "score", TypeError(f"returned {score!r}, expected a finite number"))
            return game.score
        return float(score)

    def _call(self, game: Game, name: str, function):
        """Return the result of a call in the environment, or the message of a ValueError in a tool.

        Python's `random` has the episode's own state during the call.
        """
        self._called = f"{game.question.row['environment']}.{name}, row {game.question.row['id']}"
        with reward_lock():
            self._call_started = time.monotonic()
            state = random.getstate()
            random.setstate(game.random_state)
            try:
                result = function()
                return asyncio.run(result) if inspect.iscoroutine(result) else result
            except ValueError as error:
                if name in game.tools:
                    return str(error)
                return self._fail(game, name, error)
            except (Exception, SystemExit) as error:
                return self._fail(game, name, error)
            finally:
                game.random_state = random.getstate()
                random.setstate(state)
                self._call_started = math.inf

    def _fail(self, game: Game, name: str, error: Exception) -> None:
        """Raise RewardError for a failure of an environment; with reward_errors: skip, leave its episode out."""
        row = game.question.row
        environment = row["environment"]
        file = Path(environment.rpartition(":")[0]).resolve()
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
        place = f" (line {lines[-1]})" if lines else ""
        text = f"environment {environment}.{name}{place}, row {row['id']}: {type(error).__name__}: {first_line(error)}"
        if isinstance(error, DataError) or self.config.reward_errors == "stop":
            raise RewardError(text) from error
        game.error = game.error or RewardError(text)
