"""Sample a model's answers to the questions of a source: calibrate the questions, or distil demonstrations.

The results of each batch of questions are appended to FILE.partial, so that an interrupted command continues there. FILE
is written at the end.
"""

import json
import sys
import zlib
from pathlib import Path

from data import DataError, load
from data.environments import assign_environment, environment_of
from grading import check_tests, load_rewards, preflight, sandbox
from rl.config import Config
from rl.run.files import to_json, to_jsonl, write_atomic

BATCH = 32  # questions sampled at a time
LEAST, MOST = 0.2, 0.8  # pass rates of the questions that calibrate keeps
FEW_SHOT = """\
Work step by step inside <think> and </think>, one step a line. Then write only the final answer in \\boxed{}, or only the
function. Examples:
What is 12 - 7 + 4?
<think>12-7=5
5+4=9</think>\\boxed{9}
Mia has 6 pens. Mia buys 8 more. Mia loses 3. How many pens does Mia have?
<think>6+8=14
14-3=11</think>\\boxed{11}"""


def calibrate(sources: list[str], num_samples: int, config: Config, split: str, n: int | None, out: Path) -> str:
    """Write the questions that are solved in LEAST to MOST of the samples to `out`, with a column `pass_rate`.

    Returns a histogram of the pass rates of all questions.
    """
    rows = load_all(sources, n, split, config)
    records = sample(rows, num_samples, config, out)
    graded = [(row, r["right"] / r["graded"]) for row, r in zip(rows, records) if r["graded"]]
    kept = [row | {"pass_rate": rate, "level": 1 - rate} for row, rate in graded if LEAST <= rate <= MOST]
    lines = [f"{num_samples} answers of {config.model} to each of {len(rows)} questions", "pass rate    questions"]
    lines += histogram([rate for _, rate in graded])
    if len(graded) < len(rows):
        lines.append(f"ungraded     {len(rows) - len(graded):>9}")
    if not kept:
        easy = sum(rate for _, rate in graded) > len(graded) / 2
        hint = "harder questions" if easy else "easier questions, or a cold start (docs/runs.md)"
        raise DataError("\n".join([*lines, f"no question is solved at times but not always: use {hint}"]))
    write_atomic(out, to_jsonl(kept))
    partial_file(out).unlink()
    return "\n".join([*lines, f"{len(kept)} questions solved in 20 to 80 % of the samples: {out} (--train-data {out})"])


def histogram(rates: list[float]) -> list[str]:
    """Return lines with the number of questions whose pass rate is 0, in one of the ranges between, or 1."""
    counts = dict.fromkeys(("0 %", "1 to 19 %", "20 to 39 %", "40 to 59 %", "60 to 80 %", "81 to 99 %", "100 %"), 0)
    names = list(counts)
    limits = (0.0, LEAST, 0.4, 0.6)  # of the second to the fifth range
    for rate in rates:
        if rate in (0, 1):
            position = 0 if rate == 0 else len(names) - 1
        elif rate > MOST:
            position = len(names) - 2
        else:
            position = 1 + max(i for i, limit in enumerate(limits) if rate >= limit)
        counts[names[position]] += 1
    return [f"{name:<12} {n:>9}  {'#' * round(40 * n / len(rates))}" for name, n in counts.items()]


def distil(
    sources: list[str], num_samples: int, config: Config, split: str, n: int | None, out: Path, keep_right: bool
) -> str:
    """Write the model's own answers as demonstrations: of each question the shortest right one, or all graded ones.

    Unless `system_prompt` is set, the model is shown two worked examples. The demonstrations do not contain them.
    """
    config.system_prompt = config.system_prompt or FEW_SHOT
    rows = load_all(sources, n, split, config)
    if any(map(environment_of, rows)):
        raise DataError("distil writes answers of one turn; for episodes use python -m data demos ENVIRONMENT")
    demonstrations = []
    for row, record in zip(rows, sample(rows, num_samples, config, out)):
        answers = sorted(record["answers"], key=lambda answer: len(answer["completion"]))
        chosen = [answer for answer in answers if answer["verdict"] == "right"][:1] if keep_right else answers
        demonstrations += [{"prompt": row["prompt"]} | answer for answer in chosen]
    if not demonstrations:
        raise DataError(
            f"{', '.join(sources)}: none of the {num_samples} answers to each question is right: use easier questions"
        )
    write_atomic(out, to_jsonl(demonstrations))
    partial_file(out).unlink()
    return f"{len(demonstrations)} demonstrations for {len(rows)} questions: {out} (--sft-data {out})"


def load_all(sources: list[str], n: int | None, split: str, config: Config) -> list[dict]:
    rows = [row for source in sources for row in load(source, n, split, config.columns, config.seed)]
    assign_environment(rows, config.environment)
    return rows


def sample(rows: list[dict], num_samples: int, config: Config, out: Path) -> list[dict]:
    """Sample and grade answers to every row. Returns a record for each, with the numbers of right and graded answers."""
    sandbox.start(config.code_timeout, config.unsafe_run_model_code)
    rewards = load_rewards(
        config.rewards_file, config.reward_funcs, config.reward_weights, config.reward_errors, config.max_steps
    )
    for note in check_tests(rows) + preflight(rewards, rows):
        print(f"  note     {note}", file=sys.stderr)
    task = [num_samples, config.model, config.adapter, config.system_prompt, config.max_completion_length]
    task += [config.temperature, config.seed, [(row["prompt"], row.get("environment")) for row in rows]]
    key = zlib.crc32(to_json(task).encode())
    partial = partial_file(out)
    text = partial.read_text(encoding="utf-8") if partial.exists() else ""
    records = [json.loads(line) for line in text.split("\n")[:-1]]  # a crash can cut off the last line
    if records and records[0]["key"] != key:
        raise DataError(f"{partial} was begun with other questions or settings: delete it, or choose another --out")
    if len(records) == len(rows):
        return records

    from rl.model.backends import import_backend

    import_backend(config)
    import torch

    from rl.model.policy import load_policy
    from rl.model.sampling import Sampling
    from rl.rollout import rollout_and_score
    from rl.run.checks import check_sampler

    policy = load_policy(config)
    questions = policy.encode(rows)
    check_sampler(policy, questions)
    sampling = Sampling.from_config(config)
    del records[len(records) // BATCH * BATCH :]  # an incomplete batch is sampled again
    write_atomic(partial, to_jsonl(records))
    for start in range(len(records), len(rows), BATCH):
        batch = questions[start : start + BATCH]
        generator = torch.Generator(policy.device).manual_seed(config.seed + start)
        label = f"questions {start + 1} to {start + len(batch)} of {len(rows)}"
        episodes = rollout_and_score(policy, batch, num_samples, sampling, generator, rewards, config, 0, label)
        new = []
        for i, question in enumerate(batch):
            graded = [e for e in episodes[i * num_samples : (i + 1) * num_samples] if e.score.verdict != "ungraded"]
            answers = [{"completion": e.completion.text, "verdict": e.score.verdict} for e in graded if not e.truncated]
            right = sum(e.score.is_right for e in graded)
            new.append(
                {"key": key, "id": question.row["id"], "right": right, "graded": len(graded), "answers": answers}
            )
        with partial.open("a", encoding="utf-8") as file:
            file.write(to_jsonl(new))
        records += new
        print(
            f"{label}: {sum(r['right'] for r in new) / max(1, sum(r['graded'] for r in new)):.0%} right",
            file=sys.stderr,
        )
    return records


def partial_file(out: Path) -> Path:
    return out.with_name(out.name + ".partial")
