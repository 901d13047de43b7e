"""The self-test of a reward file: what it gives to completions whose worth is known. Starts at once and needs no model.

    python rewards.py                                       on questions of sums, words and functions
    python rewards.py --data my.jsonl --columns prompt=question answer=gold
    python rewards.py --watch                               again at every save
    python rewards.py --rescore runs/NAME                   a run's completions, with the file as it is now: old -> new
    python -m grading self-test my_rewards.py ...           another file

The completions are the file's own `examples` and, for each question, its gold put as a good completion would put it, and
what must not be paid for (grading/rewards/probes.py). Only the weighted total is judged, and only against what is labelled wrong:
the self-test fails where such a completion scores as high as the right one, and where a reward is the same for everything.
"""

import argparse
import math
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from grading.base import RewardError, Score, row_kind, shorten
from grading.rewards import probes
from grading.rewards.reward_file import Rewards, load_rewards

WIDTH = 110  # columns of the table
REASON_WIDTH = 22  # of them at least, where the names of the rewards are long
WATCH_SECONDS = 0.3  # between two looks at the file


@dataclass
class Trial:
    """One completion with what it should be and what it got."""

    block: str  # the source of its question
    row: dict
    probe: probes.Probe
    score: Score


def self_test(file: str, arguments: list[str] | None = None) -> None:
    """The command line of the self-test. Ends the program: status 0 where all is well, 1 where not."""
    parser = argparse.ArgumentParser(
        prog=f"python {Path(file).name}", description="What this reward file gives to completions whose worth is known."
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SOURCE",
        default=["sums", "words", "functions"],
        help="where the questions come from",
    )
    parser.add_argument("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="such as prompt=question")
    parser.add_argument("-n", type=int, default=3, help="questions of each source (default 3)")
    parser.add_argument("--watch", action="store_true", help="again at every save of the file, until Ctrl-C")
    parser.add_argument(
        "--rescore", metavar="RUN", help="a run folder, or a file such as its rollouts.jsonl or failed.jsonl"
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    columns = [pair.split("=", 1) for pair in options.columns]
    if any(len(pair) != 2 for pair in columns) or options.n < 1:
        parser.error("--columns takes pairs such as prompt=question, -n a number from 1")
    sys.stdout.reconfigure(errors="replace")  # a console may not know every character
    if not Path(file).is_file():
        sys.exit(f"error: there is no file {file}")
    if options.watch:
        return _watch(file, [argument for argument in arguments if argument != "--watch"])

    from data import DataError

    try:
        if options.rescore:
            from tools.rescore import rescore

            rescore(file, options.rescore)
        elif not _test(file, options.data, dict(columns), options.n):
            sys.exit(1)
    except (RewardError, DataError) as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _watch(file: str, arguments: list[str]) -> None:
    """Run the self-test in a fresh process at every change of the file."""
    command = [sys.executable, "-m", "grading", "self-test", file, *arguments]
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    seen = None
    try:
        while True:
            changed = Path(file).stat().st_mtime_ns if Path(file).exists() else None
            if changed not in (seen, None):
                seen = changed
                print(f"--- {time.strftime('%H:%M:%S')} {file}", flush=True)
                subprocess.run(command, env=environment)
                print("--- waiting for the next save; Ctrl-C ends", flush=True)
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        print()


def _test(file: str, sources: list[str], columns: dict[str, str], n: int) -> bool:
    """Print the tables, what fails and the verdict; whether nothing fails."""
    from data import load  # here alone grading and data meet

    started = time.perf_counter()
    rewards = load_rewards(file)
    rows = {source: load(source, n, columns=columns) for source in sources}
    notes = rewards.check([row for found in rows.values() for row in found])
    functions = ", ".join(f"{f.name} {f.weight:g}" if f.weight else f"{f.name} (metric)" for f in rewards.functions)
    print(textwrap.fill(f"{Path(file).name}: {functions}", WIDTH, subsequent_indent="    "))
    trials = _try_examples(rewards)
    failures = _judge_examples(trials)
    if trials:
        _print_table(rewards, "examples in the file", trials, failures)
    best_example = max((t.score.total for t in trials if t.probe.is_right), default=math.nan)
    for source, found in rows.items():
        for kind in dict.fromkeys(map(row_kind, found)):
            block = [row for row in found if row_kind(row) == kind]
            style, tried = _try_rows(rewards, Path(source).name, block)
            failed, noted = _judge(tried, best_example)
            _print_table(rewards, _title(Path(source).name, block, style), tried, failed)
            trials, failures, notes = trials + tried, failures | failed, notes + noted
    failed, noted = _judge_functions(rewards, trials)
    print()
    for note in notes + noted:
        print(textwrap.fill(note, WIDTH, subsequent_indent="    "))
    for failure in [*failures.values(), *failed]:
        print(f"FAIL: {failure}")
    problems = len(failures) + len(failed)
    verdict = f"FAILED: {problems} problem{'s' if problems > 1 else ''}" if problems else "passed"
    print(
        f"self-test {verdict}; {len(rewards.names)} rewards, {sum(map(len, rows.values()))} questions, {len(trials)} "
        f"completions, {time.perf_counter() - started:.1f} s"
    )
    return not problems


# --- trying


def _score(rewards: Rewards, block: str, tried: Iterable[tuple[dict, probes.Probe]]) -> list[Trial]:
    tried = list(tried)
    scores = rewards.score_all([probes.completion(row, p.text, p.is_truncated) for row, p in tried])
    return [Trial(block, row, probe, score) for (row, probe), score in zip(tried, scores)]


def _try_examples(rewards: Rewards) -> list[Trial]:
    tried = []
    for number, example in enumerate(rewards.examples, 1):
        text = example.get("text") if isinstance(example, dict) else None
        if not isinstance(text, str) or example.get("label") not in ("right", "wrong"):
            raise RewardError(
                f"{rewards.path.name}: example {number} must be a dict with label: 'right' or 'wrong', text, and the columns "
                "of its row, such as prompt and answer"
            )
        row = {"id": f"example {number}", "task": "examples", "prompt": ""} | example
        label, text = row.pop("label"), row.pop("text")
        name = f"{number}. {shorten(' '.join(text.split()), 20)}"
        tried.append((row, probes.Probe(name, text, label == "right", row.pop("truncated", False))))
    return _score(rewards, "examples", tried)


def _try_rows(rewards: Rewards, source: str, rows: list[dict]) -> tuple[str, list[Trial]]:
    """Score everything for rows of one kind, the answers written in the style that the file pays best; that style."""
    by_style = {
        style: _score(rewards, source, [(row, probe) for row in rows for probe in probes.ideals(row, style)])
        for style in probes.styles_of(rows[0])
    }
    best = max(by_style, key=lambda style: sum(t.score.total for t in by_style[style] if not math.isnan(t.score.total)))
    wrongs = _score(rewards, source, [(row, probe) for row in rows for probe in probes.wrongs(row, best)])
    return best, by_style[best] + wrongs


# --- judging


def _judge(trials: list[Trial], best_example: float) -> tuple[dict[tuple, str], list[str]]:
    """What fails on the questions of one source, by (source, name of the probe), and notes."""
    source, failures, notes, places = trials[0].block, {}, [], {}
    for row_id in dict.fromkeys(t.row["id"] for t in trials):
        of_row = [t for t in trials if t.row["id"] == row_id]
        ideals = [t.score for t in of_row if t.probe.is_right]
        best = max((s.total for s in ideals if not math.isnan(s.total)), default=best_example)
        if ideals and all(math.isnan(s.total) for s in ideals):
            notes.append(f"{row_id}: the gold is ungraded ({'; '.join(ideals[0].reasons.values())})")
            continue
        if not ideals and math.isnan(best):
            # nothing to compare with: at least the empty completion must not be the best
            totals = [t.score.total for t in of_row]
            best = max(totals) if max(totals) > min(totals) else math.nan
            of_row = [t for t in of_row if t.probe.name == "empty"]
        for t in of_row:
            if not t.probe.is_right and t.score.total >= best - 1e-9:
                places.setdefault((source, t.probe.name), []).append((t.score.total, best))
    if not any(t.probe.is_right for t in trials):
        notes.append(
            f"{source}: no gold (answer, solution): probes that need one are left out; examples in the file help"
        )
    questions = len({t.row["id"] for t in trials})
    other = "the right one" if any(t.probe.is_right for t in trials) else "the best there is"
    for (source, name), found in places.items():
        total, best = found[0]
        failures[source, name] = (
            f"{source}: {name!r} (wrong) gets {total:.3g}, {other} {best:.3g}, in {len(found)} of {questions} questions"
        )
    return failures, notes


def _judge_examples(trials: list[Trial]) -> dict[tuple, str]:
    """Wrong examples that get as much as the best right one of the same question."""
    failures = {}
    for t in trials:
        same = [o.score.total for o in trials if o.probe.is_right and o.row["prompt"] == t.row["prompt"]]
        if not t.probe.is_right and same and t.score.total >= max(same) - 1e-9:
            failures["examples", t.probe.name] = (
                f"{t.row['id']} ({t.probe.name!r}), marked wrong, gets {t.score.total:.3g}, the best right one {max(same):.3g}"
            )
    return failures


def _judge_functions(rewards: Rewards, trials: list[Trial]) -> tuple[list[str], list[str]]:
    """Rewards that are the same for everything, and notes on those that were never asked."""
    failures, notes = [], []
    for name in rewards.names:
        values = [t.score.parts[name] for t in trials if t.score.parts[name] is not None]
        if not values:
            notes.append(f"{name} applied to none of these questions: --data SOURCE tries others")
        elif len(values) > 1 and len(set(values)) == 1:
            failures.append(
                f"{name} gives {values[0]:g} to all {len(values)} completions: nothing can be learnt from it"
            )
    return failures, notes


# --- printing


def _title(source: str, rows: list[dict], style: str) -> str:
    question = shorten(" ".join(probes.completion(rows[0], "").prompt.split()), 50)
    written = f", the answers written as {style}" if probes.gold_of(rows[0]) is not None else ""
    return f"{source}{written}: {len(rows)} question{'s' if len(rows) > 1 else ''} such as {question!r}"


def _print_table(rewards: Rewards, title: str, trials: list[Trial], failures: dict[tuple, str]) -> None:
    """One line for each kind of completion; where the questions of a source differ, the range of values."""
    by_name = {}
    for t in trials:
        by_name.setdefault(t.probe.name, []).append(t)

    def values(f, trials):
        return [(t.score.parts if f.weight else t.score.metrics)[f.name] for t in trials]

    functions = [f for f in rewards.functions if any(value is not None for value in values(f, trials))]
    lines = []
    for name, same in by_name.items():
        mark = "!" if (same[0].block, name) in failures else " "
        verdict = "/".join(dict.fromkeys(t.score.verdict for t in same))
        reason = "; ".join(dict.fromkeys(filter(None, same[0].score.reasons.values())))
        lines.append(
            [f"{mark} {name}", "right" if same[0].probe.is_right else "wrong"]
            + [_range(values(f, same), max(5, 48 // len(functions) - 2)) for f in functions]
            + [
                _range([t.score.total for t in same], 10),
                verdict[:9],
                f"{max(t.score.seconds for t in same) * 1000:.0f}",
            ]
            + [" ".join(reason.split())]
        )
    headers = ["  completion", "is", *(f.name for f in functions), "total", "verdict", "ms", "reason"]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    named = range(2, 2 + len(functions))
    for i in set(range(len(headers))) - set(named):
        widths[i] = max(widths[i], len(headers[i]))
    while (
        room := WIDTH - sum(widths[:-1]) - 2 * len(widths) - min(REASON_WIDTH, widths[-1])
    ):  # long names share what room there is
        cut = [i for i in named if widths[i] < len(headers[i])][: max(0, room)]
        if not cut:
            break
        for i in cut:
            widths[i] += 1
    widths[-1] = max(8, WIDTH - sum(widths[:-1]) - 2 * (len(widths) - 1))
    print(f"\n{shorten(title, WIDTH)}")
    for cells in [headers, *lines]:
        aligned = [
            f"{shorten(cell, width) if i == len(cells) - 1 else cell[:width]:{'<' if i in (0, 1, len(cells) - 1) else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(cells, widths))
        ]
        print("  ".join(aligned).rstrip())


def _range(values: list[float | None], width: int) -> str:
    """Values as "1", "0..1" (only the largest, "<=1", where that is too wide) or "-" where none applies."""
    known = [0.0 if v == 0 else v for v in values if v is not None]  # no minus zero
    if not known:
        return "-"
    if any(math.isnan(v) for v in known):
        return "ungraded"
    low, high = f"{min(known):.3g}", f"{max(known):.3g}"
    if low == high:
        return low
    return f"{low}..{high}" if len(low) + len(high) + 2 <= width else f"<={max(known):.2g}"
