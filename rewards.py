"""What is good: the reward functions. This is the one file to edit.

A function marked @reward gets one completion and returns a number (usually 0 to 1), a bool, None (does not apply) or
(number, "reason"). The rewards are added up with their weights. A function marked @metric is logged, never trained on.

A completion has: .prompt .text .thinking .answer (what stands after </think>) .row (every column of its data row)
.tokens .truncated .step. `when=` limits a reward to rows with an answer ("math"), with tests ("code"), or to one task.
"""

import re

from grading import Completion, extract_answer, extract_code, grade_code, grade_math, metric, reward


@reward(weight=1.0, when="math")
def correct(completion: Completion):
    """1 where the final answer (in \\boxed{}, after ####, ...) equals the row's answer, compared exactly."""
    return grade_math(completion.answer, completion.row["answer"])


@reward(weight=1.0, when="code")
def passes_tests(completion: Completion):
    """1 where the function written passes every test of the row. It runs in a sandbox."""
    return grade_code(completion.answer, completion.row["tests"])


@reward(weight=0.1)
def format(completion: Completion):
    """1 for an answer that ends by itself, thinks at most once and closes it, and states its result in the right form.

    Thinking is not paid for: it has to earn its keep by being right.
    """
    tags = re.findall(r"</?think>", completion.text)
    if tags not in ([], ["<think>", "</think>"]) or (tags and not completion.text.startswith("<think>")):
        return 0.0, "think tags are not one closed block at the start"
    if completion.truncated:
        return 0.0, "cut at the length limit"
    if completion.row.get("tests"):
        return ("def " in extract_code(completion.answer)), ""
    return bool(extract_answer(completion.answer))


@metric
def thinks(completion: Completion):
    """Whether there is any thinking."""
    return bool(completion.thinking)
