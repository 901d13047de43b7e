"""Environments: games and tools for episodes of several turns. Edit this file, or write one like it.

A class has `reset`, whose text is added to the question, and public methods, which the model calls: each needs type
hints and a docstring with an `Args:` section. A ValueError is shown to the model. All of this is optional:

    prompt          question of a class that makes its own games: train_data: [environments.py:IceMaze]
    get_reward()    reward at the end of the episode; from 1 on, it counts as won
    done            True ends the episode after the turn
    score()         its change is the reward of a turn
    reset(seed)     the same number for all completions of a question

A class without `prompt` is used with questions: `environment: environments.py:Calculator`, `train_data: [long_sums]`.
Classes written for TRL's `environment_factory` work unchanged.

    python environments.py        # plays each class well and at random; see --help
"""

import random

STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


class IceMaze:
    """A small frozen lake: walk from the top left to the flag at the bottom right, and avoid the holes."""

    prompt = "Cross the ice from A to F, around the holes O: up, down, left or right?\n"
    size = 4
    holes = 4
    slippery = 0.0  # probability that a step goes in a random direction

    def reset(self, seed: int | None = None) -> str:
        self.done = False
        self._random = random.Random(seed)
        self._place = (0, 0)
        self._flag = (self.size - 1, self.size - 1)
        fields = [(row, column) for row in range(self.size) for column in range(self.size)][1:-1]
        self._holes = fields
        while not self._path():
            self._holes = self._random.sample(fields, self.holes)
        return self._draw()

    def move(self, direction: str) -> str:
        """Walk one field.

        Args:
            direction: up, down, left or right.
        """
        if direction not in STEPS:
            raise ValueError("Write up, down, left or right.")
        if self._random.random() < self.slippery:
            direction = self._random.choice(list(STEPS))
        self._place = self._neighbour(self._place, direction)
        self.done = self._place in (*self._holes, self._flag)
        return self._draw()

    def get_reward(self) -> float:
        return float(self._place == self._flag)

    def _neighbour(self, place: tuple[int, int], direction: str) -> tuple[int, int]:
        row, column = (min(max(p + s, 0), self.size - 1) for p, s in zip(place, STEPS[direction]))
        return row, column

    def _path(self) -> list[str]:
        """Return the directions of a shortest path to the flag; an empty list if there is none."""
        paths = {self._place: []}
        for place in (queue := [self._place]):
            for direction in STEPS:
                neighbour = self._neighbour(place, direction)
                if neighbour not in paths and neighbour not in self._holes:
                    paths[neighbour] = [*paths[place], direction]
                    queue.append(neighbour)
        return paths.get(self._flag, [])

    def _draw(self) -> str:
        marks = dict.fromkeys(self._holes, "O") | {self._flag: "F", self._place: "A"}
        rows = range(self.size)
        return "\n".join("".join(marks.get((row, column), ".") for column in rows) for row in rows)

    def _good_move(self) -> str:  # for the self-test and for demonstrations
        return self._path()[0]

    def _random_move(self) -> str:
        return random.choice(list(STEPS))


class SlipperyIceMaze(IceMaze):
    """An ice maze in which one step in five goes in a random direction."""

    slippery = 0.2


class Calculator:
    """A tool for the sums that a small model cannot do in its head."""

    def reset(self, prompt: str = "", **row) -> str:
        self._sum = "".join(c for c in prompt if c in "0123456789+-")
        self._result = None
        return " You can write calculate(1+2)."

    def calculate(self, expression: str) -> str:
        """Add and subtract whole numbers.

        Args:
            expression: Numbers with + and - between them, such as 12+34-5.
        """
        terms = expression.replace(" ", "").replace("-", "+-").removeprefix("+").split("+")
        if len(expression) > 200 or not all(
            term.removeprefix("-").isascii() and term.removeprefix("-").isdigit() for term in terms
        ):
            raise ValueError("Write numbers with + and - between them.")
        self._result = str(sum(map(int, terms)))
        return self._result

    def _good_move(self) -> str:
        return f"calculate({self._sum})" if self._result is None else f"\\boxed{{{self._result}}}"

    def _random_move(self) -> str:
        return f"\\boxed{{{self._result or random.randint(-99, 400)}}}"


class GuessNumber:
    """Find a number from 1 to 20 in five guesses."""

    prompt = "Guess my number from 1 to 20. You have five guesses."

    def reset(self, seed: int | None = None) -> None:
        self.done = False
        self._number = random.Random(seed).randint(1, 20)
        self._guesses = []
        self._range = [1, 20]

    def guess(self, number: str) -> str:
        """Guess the number.

        Args:
            number: A number from 1 to 20.
        """
        if not (number.isascii() and number.isdigit()):
            raise ValueError("Write a number from 1 to 20.")
        guess = int(number)
        self._guesses.append(guess)
        self.done = guess == self._number or len(self._guesses) == 5
        if guess < self._number:
            self._range[0] = max(self._range[0], guess + 1)
            return "Too low."
        if guess > self._number:
            self._range[1] = min(self._range[1], guess - 1)
            return "Too high."
        return "Right."

    def get_reward(self) -> float:
        return float(self._number in self._guesses)

    def _good_move(self) -> str:
        return str(sum(self._range) // 2)

    def _random_move(self) -> str:
        return str(random.randint(1, 20))


if __name__ == "__main__":
    from tools.play_test import play_test

    play_test(__file__)
