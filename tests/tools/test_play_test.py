"""The self-test of environments, demonstrations of episodes, games of gymnasium, and a run that plays."""

import json
import random
import sys
import types

import pytest
from conftest import ROOT, lines
from running import finish

from bench import q_learning
from data import DataError, load
from data.demonstrations import play_demonstrations, read_demonstrations
from data.environments import play_moves
from rl.config import Config
from rl.model.policy import load_policy
from rl.run.cold_start import encode_demonstrations
from rl.run.report import format_answer
from tools.play_test import play_test

UNFAIR = '''
class Unfair:
    prompt = "Play."

    def reset(self):
        self.done = False

    def act(self, text: str) -> str:
        """Act.

        Args:
            text: Anything.
        """
        self.done = True
        return "yes"

    def get_reward(self):
        return 1.0

    def _good_move(self):
        return "good"

    def _random_move(self):
        return "bad"
'''


def test_the_bundled_classes_pass(capsys):
    play_test("environments.py", ["--episodes", "50"])
    assert "IceMaze            good play 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (UNFAIR, "Unfair: random play earns as much as good play"),
        (UNFAIR.replace("            text: Anything.\n", ""), "Unfair.act"),
        ("x = 1\n", "no class with a method reset"),
    ],
)
def test_failures(tmp_path, capsys, source, message):
    path = tmp_path / "games.py"
    path.write_text(source)
    with pytest.raises(SystemExit) as stopped:
        play_test(str(path), [])
    assert message in capsys.readouterr().out + str(stopped.value)


def test_demonstrations_have_the_tokens_of_played_episodes(tmp_path):
    rows = load("environments.py:IceMaze", 5, "pretrain")
    demos = play_demonstrations("environments.py:IceMaze", rows, 5, seed=0, skill=1.0)
    path = tmp_path / "demos.jsonl"
    path.write_text("".join(json.dumps(demo) + "\n" for demo in demos))
    read, _ = read_demonstrations(str(path), [])
    policy = load_policy(Config(device="cpu"))
    for row, episode in zip(rows, encode_demonstrations(policy, read)):
        turns, environment = play_moves("environments.py:IceMaze", dict(row), lambda game: game._good_move())
        assert environment.get_reward() == 1
        text = "<|assistant|>".join(
            f"{move}<|end|>" + (f"<|user|>{reply}" if i + 1 < len(turns) else "")
            for i, (move, reply) in enumerate(turns)
        )
        assert policy.tokenizer.decode(episode.completion_ids) == text
        sampled = [token for token, flag in zip(episode.completion_ids, episode.is_sampled) if flag]
        assert policy.tokenizer.decode(sampled) == "".join(f"{move}<|end|>" for move, _ in turns)


def test_a_game_of_gymnasium():
    rows = load("gym:FrozenLake-v1", 3)
    assert (
        rows[0]["prompt"].startswith("Play FrozenLake-v1.")
        and rows[0]["observation"].startswith("[S]FFF\nFHFH")
        and "\x1b" not in rows[0]["observation"]
    )
    turns, game = play_moves("gym:FrozenLake-v1", dict(rows[0]), lambda game: "1", max_turns=50)
    assert game.done and game.get_reward() in (0.0, 1.0)
    assert (
        play_moves("gym:FrozenLake-v1", dict(rows[0]), lambda game: "9", max_turns=1)[0][0][1]
        == "Write a number from 0 to 3."
    )


class RepeatingGame:
    """A game in the form of textarena, whose observations repeat all earlier ones."""

    def reset(self, num_players, seed):
        self.text = f"Guess. Seed {seed}.\n"

    def get_observation(self):
        return 0, self.text

    def step(self, action):
        self.text += f"[You] {action}\n[Game] No.\n"
        return action == "[3]", {}

    def close(self):
        return {0: 1.0}, {}


def test_a_game_of_textarena_appends_only_what_is_new(monkeypatch):
    monkeypatch.setitem(sys.modules, "textarena", types.SimpleNamespace(make=lambda name: RepeatingGame()))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    moves = iter(["[1]", "[2]", "[3]"])
    turns, game = play_moves("textarena:Repeating-v0", {"id": "1", "seed": 5}, lambda game: next(moves))
    assert turns == [("[1]", "[You] [1]\n[Game] No."), ("[2]", "[You] [2]\n[Game] No."), ("[3]", "")]
    assert game.done and game.get_reward() == 1.0


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install textarena"):
        load("textarena:Wordle-v0", 1)


def test_a_run_that_plays_resumes_to_the_same_bits(tmp_path):
    whole = tmp_path / "whole"
    assert finish(whole, "episodes") == 0
    parts = tmp_path / "parts"
    assert finish(parts, "episodes", faults={"rl.model.play:Play:replies": (60, KeyboardInterrupt())}) != 0
    assert finish(parts, "episodes", resume=True) == 0
    for file in sorted((whole / "rollouts").iterdir()):
        assert lines(file) == lines(parts / "rollouts" / file.name)
    line = lines(whole / "rollouts/000001.jsonl")[0]
    assert line["turns"] and line["prompt"].startswith("Cross the ice")
    assert (ROOT / "environments.py").is_file()


def test_the_console_shows_all_turns():
    turns = [{"text": "up", "reply": "A.\n.F"}, {"text": "down", "reply": ""}]
    record = {"question": "Where?", "expected": None, "completion": "down", "verdict": "wrong", "turns": turns}
    assert format_answer(record).splitlines()[1:5] == [
        "  answer:   up",
        "            > A.",
        "            > .F",
        "            down",
    ]


def test_q_learning_solves_the_mazes_that_it_learns_from():
    random.seed(0)
    table = q_learning.Table()
    for _ in range(3000):
        q_learning.episode(table, 5, slippery=0.0, learns=True)
    assert q_learning.win_rate(table, [5], slippery=0.0) == 1 == q_learning.optimum([5])
