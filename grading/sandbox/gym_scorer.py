"""Scores answers with the package reasoning_gym. Runs in a worker process, inside the sandbox if there is one.

Inside the sandbox, this is the only file of the project beside those of the server: it imports nothing of the project.
"""

import functools


def score(family: str, level: int | None, answer: str, entry: dict) -> tuple[float, str]:
    """Return what the family's `score_answer` gives, and the exception that it raised, if any."""
    puzzles = dataset(family, level)
    try:
        return float(puzzles.score_answer(answer, entry)), ""
    except Exception as error:
        return 0.0, f"{type(error).__name__}: {error}"[:100]


@functools.lru_cache(maxsize=8)
def dataset(family: str, level: int | None):
    import reasoning_gym

    return reasoning_gym.create_dataset(family, seed=0, **level_settings(family, level))


def level_settings(family: str, level: int | None) -> dict:
    """Return the settings of a level of the family's curriculum; the defaults for None."""
    from reasoning_gym.factory import create_curriculum

    if level is None:
        return {}
    curriculum = create_curriculum(family)
    curriculum.set_global_level(level)
    settings = vars(curriculum.generate_configuration())
    return {name: value for name, value in settings.items() if name not in ("seed", "size")}
