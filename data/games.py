"""Games of other packages as environments: gym:FrozenLake-v1 (gymnasium) and textarena:Wordle-v0 (textarena).

Both packages are optional.
"""

import functools
import importlib.util
import re
from collections.abc import Callable

from data.schema import DataError

GAMES = ("gym:", "textarena:")
HIGHLIGHT = r"\x1b\[\d+m(.*?)\x1b\[0m"  # colour of a terminal, such as the player's field; written in brackets
INSTALL = {"gym:": "gymnasium==1.4.0", "textarena:": "textarena==0.7.4"}


def find_game(name: str) -> Callable[[], object]:
    """Return a function that makes the game. Raises DataError if the package or the game is missing."""
    prefix = next(prefix for prefix in GAMES if name.startswith(prefix))
    package = INSTALL[prefix].partition("==")[0]
    if importlib.util.find_spec(package) is None:
        raise DataError(f"{name}: the package {package} is not installed: pip install {INSTALL[prefix]}")
    return functools.partial(GymGame if prefix == "gym:" else TextArenaGame, name.removeprefix(prefix))


class GymGame:
    """A game of gymnasium with numbered actions and a text rendering (render_mode "ansi"), such as the toy-text games."""

    def __init__(self, name: str):
        import gymnasium

        self.done = False
        self._reward = 0.0
        try:
            self._game = gymnasium.make(name, render_mode="ansi")
        except Exception as error:
            raise DataError(f"gym:{name}: {str(error).splitlines()[0]}") from None
        if not isinstance(self._game.action_space, gymnasium.spaces.Discrete):
            raise DataError(
                f"gym:{name}: its actions are {self._game.action_space}, but only numbered ones can be played"
            )
        self.prompt = (
            f"Play {name}. In each turn, write the number of an action, 0 to {self._game.action_space.n - 1}.\n"
        )

    def reset(self, seed: int | None = None) -> str:
        self._game.reset(seed=seed)
        return self._render()

    def act(self, action: str) -> str:
        """Take an action.

        Args:
            action: Number of the action.
        """
        count = int(self._game.action_space.n)
        if not action.strip().isdigit() or int(action) >= count:
            raise ValueError(f"Write a number from 0 to {count - 1}.")
        _, reward, terminated, truncated, _ = self._game.step(int(action))
        self._reward += float(reward)
        self.done = terminated or truncated
        return self._render()

    def get_reward(self) -> float:
        return self._reward

    def _render(self) -> str:
        return re.sub(HIGHLIGHT, r"[\1]", str(self._game.render())).strip()


class TextArenaGame:
    """A game of textarena for one player."""

    prompt = "Play this game.\n"

    def __init__(self, name: str):
        import textarena

        self.done = False
        self._reward = 0.0
        self._shown = ""
        try:
            self._game = textarena.make(name)
        except Exception as error:
            raise DataError(f"textarena:{name}: {str(error).splitlines()[0]}") from None

    def reset(self, seed: int | None = None) -> str:
        self._game.reset(num_players=1, seed=seed)
        return self._observation()

    def act(self, action: str) -> str:
        """Take an action.

        Args:
            action: The move, in the form that the game asks for.
        """
        self.done, _ = self._game.step(action=action)
        if self.done:
            rewards, _ = self._game.close()
            self._reward = float(rewards[0])
            return ""
        return self._observation()

    def get_reward(self) -> float:
        return self._reward

    def _observation(self) -> str:
        """Return what is new: most games repeat what they have shown before."""
        _, observation = self._game.get_observation()
        if not isinstance(observation, str):  # games without a wrapper return messages
            observation = "\n".join(str(message) for _, message, *_ in observation)
        new = observation.removeprefix(self._shown)
        self._shown = observation
        return new.strip()
