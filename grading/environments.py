"""The reward of an episode with an environment (environments.py)."""

from grading.base import Completion, Turn, Ungraded


def grade_environment(completion: Completion) -> tuple[list[tuple[Turn, float]] | float, str] | None:
    """Return what the environment's get_reward() returned, with "right" or "wrong" as its reason; from 1 on it is right.

    If the environment has a score, its changes are the rewards of the turns, and the rest is that of the last turn.
    Returns None if the class has no get_reward().

    Raises:
        Ungraded: The completion was not played, such as a text from a file.
    """
    if completion.environment is None:
        raise Ungraded("this text was not played in its environment, and cannot be graded without it")
    if completion.environment_reward is None:
        return None
    total = float(completion.environment_reward)
    outcome = "right" if total >= 1 else "wrong"
    reason = f"{outcome}: reward {total:g} after {len(completion.turns)} turns"
    changes = [(turn, turn.score) for turn in completion.turns if turn.score is not None]
    if not changes:
        return total, reason
    rest = total - sum(change for _, change in changes)
    return [*changes, (completion.turns[-1], rest)], reason
