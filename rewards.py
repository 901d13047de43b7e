"""What is good: the reward functions. This is the one file to edit.

A function marked @reward gets one completion and returns a number (usually 0 to 1), a bool, None (does not apply) or
(number, "reason"), or a list of (position, number): what each step of the text is worth. The rewards are added up with
their weights. A function marked @metric is logged, never trained on. Functions written for TRL work as they are: mark
them with @reward, or name them in a list, reward_funcs = [...].

A completion has: .prompt .text .thinking .answer (what stands after </think>) .row (every column of its data row)
.tokens .truncated .step. `when=` limits a reward to rows with an answer ("math"), with tests ("code"), for another grader
("countdown", "reasoning_gym"), or to one task.

    python rewards.py             # shows what these functions give to good and bad completions; --help tells more
"""

import operator
import re

from grading import (
    Completion,
    extract_answer,
    extract_code,
    grade_code,
    grade_countdown,
    grade_gym,
    grade_math,
    metric,
    reward,
    row_kind,
)


@reward(weight=1.0, when="math")
def correct(completion: Completion):
    """1 where the final answer (in \\boxed{}, after ####, ...) equals the row's answer."""
    return grade_math(completion.answer, completion.row["answer"])


@reward(weight=1.0, when="code")
def passes_tests(completion: Completion):
    """1 where the program passes every test of the row. It runs in a sandbox."""
    row = completion.row
    return grade_code(
        completion.answer, row["tests"], row.get("entry_point"), row.get("setup") or "", row.get("starter") or ""
    )


@reward(weight=1.0, when="countdown")
def hits_target(completion: Completion):
    """1 where an expression of the given numbers, each used as often as it is given, makes the target."""
    return grade_countdown(completion.answer, completion.row["target"], completion.row["nums"])


@reward(weight=1.0, when="reasoning_gym")
def solves(completion: Completion):
    """1 where reasoning_gym gives the answer full marks."""
    return grade_gym(completion.answer, completion.row)


@reward(weight=0.1)
def format(completion: Completion):
    """1 for an answer that ends by itself, thinks at most once and closes it, and states its result in the right form.

    Thinking is not paid for: it has to earn its keep by being right.
    """
    state = "start"
    for part in re.split(r"(</?think>)", completion.text):
        if part in ("<think>", "</think>"):
            state = {("start", "<think>"): "thinking", ("thinking", "</think>"): "answer"}.get((state, part), "broken")
        elif part and state == "start":
            state = "answer"  # no tag may follow
    if state in ("thinking", "broken"):
        return 0.0, "think tags are not one closed block at the start"
    if completion.truncated:
        return 0.0, "cut at the length limit"
    if row_kind(completion.row) == "code":
        return "def " in extract_code(completion.answer)
    return bool(extract_answer(completion.answer))


def right_steps(completion: Completion):
    """A process reward: -1 where the first wrong line of the thinking ends, else 0 where the last one ends.

    A line is a + b = c, with +, - or *, in whole numbers. It counts where a recipe names it: `reward_funcs: [correct,
    passes_tests, format, right_steps]`, `reward_weights: {right_steps: 0.2}`. One value a completion, not one a line: GRPO
    centres the values of a group, so that even 0 a line would pay for more lines; and what is built on an error is not
    judged. None without such lines: whether to think is left to the other rewards.
    """
    step = re.compile(r"(-?[0-9]{1,30}) *([-+*]) *(-?[0-9]{1,30}) *= *(-?[0-9]{1,30})")
    value = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    start = (completion.text.rpartition("</think>")[0] or completion.text).rindex(completion.thinking)
    last, lines = None, completion.thinking.split("\n")
    if completion.truncated and "</think>" not in completion.text:
        lines.pop()  # cut before its end
    for line in lines:
        end = start + len(line)
        if found := step.fullmatch(line.strip()):
            a, sign, b, c = found.groups()
            if value[sign](int(a), int(b)) != int(c):
                return [(end, -1.0)]
            last = end
        start = end + 1
    return None if last is None else [(last, 0.0)]


@metric
def thinks(completion: Completion):
    """Whether there is any thinking."""
    return bool(completion.thinking)


examples = [  # completions that must be paid for, and others that must get less: add what your model comes up with
    {"prompt": "What is 3 + 4?", "answer": "7", "label": "right", "text": "<think>3+4=7</think>\\boxed{7}"},
    {"prompt": "What is 3 + 4?", "answer": "7", "label": "wrong", "text": "<think>3+4=7</think>\\boxed{8}"},
    {
        "prompt": "What is 3 + 4?",
        "answer": "7",
        "label": "wrong",
        "text": "It could be \\boxed{7}, or rather \\boxed{6}",
    },
]

if __name__ == "__main__":
    from tools.self_test import self_test

    self_test(__file__)
