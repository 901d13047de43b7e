"""Reward functions. This is the only file you need to edit.

A function marked with @reward takes one completion and returns a number (usually between 0 and 1), a bool, None (it
does not apply), a pair (number, "reason"), or a list of pairs (position, number) that rewards single steps of the
text. The total reward is the weighted sum. A function marked with @metric is logged and never trained on. Reward
functions written for TRL work unchanged: mark them with @reward, or list them, reward_funcs = [...].

A completion has these attributes: .prompt, .text, .thinking, .answer (the text after </think>), .row (all columns of
its data row), .tokens, .truncated and .step. `when=` limits a reward to rows with an answer ("math"), with tests
("code"), with another grader ("countdown", "reasoning_gym", "environment"), or of one task.

    python rewards.py             # self-test: scores right, wrong and hostile completions; see --help
"""

import operator
import re

from grading import (
    Completion,
    extract_answer,
    extract_code,
    grade_code,
    grade_countdown,
    grade_environment,
    grade_gym,
    grade_math,
    metric,
    reward,
    row_kind,
)


@reward(weight=1.0, when="math")
def correct(completion: Completion):
    """Return 1 if the final answer (in \\boxed{}, after ####, ...) equals the answer of the row."""
    return grade_math(completion.answer, completion.row["answer"], completion.prompt)


@reward(weight=1.0, when="code")
def passes_tests(completion: Completion):
    """Return 1 if the program passes all tests of the row. It runs in a sandbox."""
    row = completion.row
    return grade_code(
        completion.answer, row["tests"], row.get("entry_point"), row.get("setup") or "", row.get("starter") or ""
    )


@reward(weight=1.0, when="countdown")
def hits_target(completion: Completion):
    """Return 1 if the expression equals the target and uses each of the row's numbers exactly once."""
    return grade_countdown(completion.answer, completion.row["target"], completion.row["nums"])


@reward(weight=1.0, when="reasoning_gym")
def solves(completion: Completion):
    """Return 1 if the scorer of reasoning_gym gives the answer full marks."""
    return grade_gym(completion.answer, completion.row)


@reward(weight=1.0, when="environment")
def wins(completion: Completion):
    """Return what the environment's get_reward() says at the end of the episode; from 1 on, it is won."""
    return grade_environment(completion)


@reward(weight=0.1)
def format(completion: Completion):
    """Return 1 for a complete answer in the right form, with at most one closed <think> block, at its start.

    Thinking itself is not rewarded. It pays only if it leads to right answers.
    """
    if row_kind(completion.row) == "environment":
        return None  # a move has no form of an answer
    state = "start"
    for part in re.split(r"(</?think>)", completion.text):
        if part in ("<think>", "</think>"):
            state = {("start", "<think>"): "thinking", ("thinking", "</think>"): "answer"}.get((state, part), "broken")
        elif part and state == "start":
            state = "answer"  # no tag may follow
    if state in ("thinking", "broken"):
        return 0.0, "the <think> tags do not form one closed block at the start"
    if completion.truncated:
        return 0.0, "truncated at the length limit"
    if row_kind(completion.row) == "code":
        return "def " in extract_code(completion.answer)
    return bool(extract_answer(completion.answer))


def right_steps(completion: Completion):
    """Process reward: -1 at the end of the first wrong line of the thinking, or 0 at the end of the last one.

    A line has the form a + b = c, with +, - or *, in whole numbers. Lines after the first error are not judged.
    Return None if there are no such lines. A recipe turns this reward on by name: `reward_funcs: [correct,
    passes_tests, format, right_steps]`, `reward_weights: {right_steps: 0.2}`.

    A completion gets one value, not one per line. GRPO subtracts the group mean, so even a value of 0 for each line
    would reward more lines.
    """
    step = re.compile(r"(-?[0-9]{1,30}) *([-+*]) *(-?[0-9]{1,30}) *= *(-?[0-9]{1,30})")
    value = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    start = (completion.text.rpartition("</think>")[0] or completion.text).rindex(completion.thinking)
    lines = completion.thinking.split("\n")
    last_end = None
    if completion.truncated and "</think>" not in completion.text:
        lines.pop()  # the last line is incomplete
    for line in lines:
        end = start + len(line)
        if match := step.fullmatch(line.strip()):
            a, sign, b, c = match.groups()
            if value[sign](int(a), int(b)) != int(c):
                return [(end, -1.0)]
            last_end = end
        start = end + 1
    return None if last_end is None else [(last_end, 0.0)]


@metric
def thinks(completion: Completion):
    """Return whether the completion contains any thinking."""
    return bool(completion.thinking)


# Used by the self-test: each wrong example must earn less than the right ones. Add completions of your own model.
examples = [
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
