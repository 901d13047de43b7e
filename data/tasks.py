"""Built-in task families, generated from a seed: sums, word problems, small Python functions, long sums, and Countdown.

Every question has a *key*: its content without the wording ("7+5-3", "apples:5+3-2", "+4*3"). A hash of the key
determines the question's split, so pretraining, training and evaluation questions are disjoint by construction,
whatever their seed and wording.

    from data.tasks import questions
    rows = questions("sums", split="eval", n=100, seed=0)
"""

import hashlib
import random
from dataclasses import dataclass
from functools import partial

FAMILIES = ("sums", "words", "functions", "big_sums")  # families that the bundled model was pretrained on
# Tenths of the hash range: half of all questions for pretraining, three tenths for RL, two tenths held out.
SPLITS = {"pretrain": range(0, 5), "train": range(5, 8), "eval": range(8, 10)}


@dataclass(frozen=True)
class Problem:
    """A question with all data for demonstrations and graders."""

    family: str
    key: str  # content of the question without its wording; determines the split
    prompt: str
    steps: tuple[str, ...]  # lines of a correct chain of thought
    answer: str  # the number, the expression that the function returns, or Countdown's expression
    ops: tuple[tuple[str, int], ...] = ()  # (operator, number) in the order of application
    entry_point: str = ""  # functions only: name that the tests call
    tests: tuple[str, ...] = ()  # functions only: assert statements
    target: int = 0  # Countdown only
    nums: tuple[int, ...] = ()  # Countdown only

    def columns(self) -> dict:
        """Return the columns of a row for its grader, and a complete solution."""
        if self.tests:
            solution = f"def {self.entry_point}(x):\n    return {self.answer}"
            return {"entry_point": self.entry_point, "tests": list(self.tests), "solution": solution}
        if self.nums:
            return {"grader": "countdown", "target": self.target, "nums": list(self.nums), "solution": self.answer}
        return {"answer": self.answer, "solution": "\n".join([*self.steps, f"\\boxed{{{self.answer}}}"])}


SUM_PROMPTS = ("What is {}?", "Compute {}.", "Calculate {}.", "{} = ?", "Work out {}.")

# (name of the template, opening, sentences that add, sentences that subtract, question)
WORD_TEMPLATES = (
    ("apples", "{who} has {n} apples.", ["{who} picks {n} more.", "{who} gets {n} more."], ["{who} eats {n}.", "{who} gives away {n}."], "How many apples are left?"),
    ("bus", "A bus has {n} riders.", ["{n} get on.", "{n} more get on."], ["{n} get off.", "{n} leave the bus."], "How many riders are on the bus?"),
    ("birds", "{n} birds sit on a tree.", ["{n} more land.", "{n} join them."], ["{n} fly away.", "{n} leave."], "How many birds are there?"),
    ("money", "{who} has {n} dollars.", ["{who} earns {n}.", "{who} finds {n}."], ["{who} spends {n}.", "{who} pays {n}."], "How many dollars does {who} have?"),
    ("marbles", "{who} owns {n} marbles.", ["{who} wins {n}.", "{who} buys {n}."], ["{who} loses {n}.", "{who} drops {n}."], "How many marbles does {who} own?"),
    ("books", "A shelf holds {n} books.", ["{n} are put on it.", "{n} are added."], ["{n} are taken.", "{n} are lent out."], "How many books are on the shelf?"),
    ("points", "A team has {n} points.", ["It scores {n}.", "It gains {n}."], ["It loses {n}.", "A foul costs {n}."], "How many points does it have?"),
    ("eggs", "A basket holds {n} eggs.", ["The hens lay {n} more.", "{n} are put in."], ["{n} break.", "{n} are cooked."], "How many eggs are in the basket?"),
    ("floors", "A lift is on floor {n}.", ["It goes up {n}.", "It climbs {n}."], ["It goes down {n}.", "It sinks {n}."], "Which floor is it on?"),
    ("degrees", "It is {n} degrees.", ["It warms by {n}.", "It rises by {n}."], ["It cools by {n}.", "It falls by {n}."], "How many degrees is it now?"),
    ("sheep", "A field has {n} sheep.", ["{n} walk in.", "{n} are born."], ["{n} walk out.", "{n} are sold."], "How many sheep are in the field?"),
    ("cards", "{who} holds {n} cards.", ["{who} draws {n}.", "{who} takes {n}."], ["{who} plays {n}.", "{who} discards {n}."], "How many cards does {who} hold?"),
    ("boats", "{n} boats lie in a harbour.", ["{n} sail in.", "{n} arrive."], ["{n} sail out.", "{n} sink."], "How many boats are in the harbour?"),
    ("cookies", "A jar has {n} cookies.", ["{who} adds {n}.", "{who} bakes {n} more."], ["{who} eats {n}.", "{who} takes {n}."], "How many cookies are in the jar?"),
)  # fmt: skip
NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida")

FUNCTION_PROMPTS = ("Write a Python function {}(x): {}.", "Write {}(x) in Python: {}.", "Define a function {}(x): {}.")
FUNCTION_WORDS = {"+": "add {}", "-": "subtract {}", "*": "multiply by {}"}

COUNTDOWN_PROMPT = (
    "Make {} from the numbers {}: use each of them exactly once, with +, -, *, / and brackets. Give the expression."
)
MAX_COUNTDOWN = 100  # numbers and targets are below this


def assign_split(family: str, key: str) -> str:
    """Return the split of a question, a fixed function of its key."""
    tenth = int.from_bytes(hashlib.sha256(f"{family}:{key}".encode()).digest()[:8], "big") % 10
    return next(name for name, tenths in SPLITS.items() if tenth in tenths)


def running_totals(first: int, ops) -> list[int]:
    totals = [first]
    for op, n in ops:
        totals.append(totals[-1] + n if op == "+" else totals[-1] - n)
    return totals


def write_steps(first: int, ops) -> tuple[str, ...]:
    """Return the lines of a chain of thought: ("7+5=12", "12-3=9")."""
    totals = running_totals(first, ops)
    return tuple(f"{a}{op}{n}={b}" for (op, n), a, b in zip(ops, totals, totals[1:]))


def make_sum(rng: random.Random, family="sums", low=1, high=9, terms=(3, 4, 5, 6)) -> Problem:
    """Generate a sum of numbers from `low` to `high`; how many is drawn from `terms`."""
    first = rng.randint(low, high)
    ops = tuple((rng.choice("+-"), rng.randint(low, high)) for _ in range(rng.choice(terms) - 1))
    expression = f"{first}" + "".join(f" {op} {n}" for op, n in ops)
    answer = str(running_totals(first, ops)[-1])
    prompt = rng.choice(SUM_PROMPTS).format(expression)
    return Problem(family, expression.replace(" ", ""), prompt, write_steps(first, ops), answer, ops)


def make_word_problem(rng: random.Random) -> Problem:
    name, opening, gains, losses, question = rng.choice(WORD_TEMPLATES)
    who = rng.choice(NAMES)
    first = total = rng.randint(2, 9)
    ops = []
    sentences = [opening.format(n=first, who=who)]
    for _ in range(rng.randint(2, 4)):
        op, n = rng.choice("+-"), rng.randint(1, 9)
        if op == "-" and n > total:  # totals are never negative
            op = "+"
        total += n if op == "+" else -n
        ops.append((op, n))
        sentences.append(rng.choice(gains if op == "+" else losses).format(n=n, who=who))
    prompt = " ".join(sentences) + " " + question.format(who=who)
    key = f"{name}:{first}" + "".join(f"{op}{n}" for op, n in ops)
    return Problem("words", key, prompt, write_steps(first, ops), str(total), tuple(ops))


def make_function(rng: random.Random) -> Problem:
    ops = tuple((op, rng.randint(2, 9)) for op in rng.choices("+-*", k=rng.randint(2, 3)))
    key = "".join(f"{op}{n}" for op, n in ops)
    name = rng.choice("fgh")
    words = ", then ".join(FUNCTION_WORDS[op].format(n) for op, n in ops)
    expressions = build_expressions(ops)
    arguments = rng.sample(range(-9, 10), 4)
    tests = tuple(f"assert {name}({x}) == {apply_ops(ops, x)}" for x in arguments)
    prompt = rng.choice(FUNCTION_PROMPTS).format(name, words)
    return Problem("functions", key, prompt, tuple(expressions), expressions[-1], ops, name, tests)


def build_expressions(ops) -> list[str]:
    """Return the expression after each operation, with the brackets that Python needs: x+4, then (x+4)*3."""
    expressions = []
    text = "x"
    is_sum = False
    for op, n in ops:
        text = f"({text}){op}{n}" if op == "*" and is_sum else f"{text}{op}{n}"
        is_sum = op != "*"
        expressions.append(text)
    return expressions


def apply_ops(ops, x: int) -> int:
    for op, n in ops:
        x = {"+": x + n, "-": x - n, "*": x * n}[op]
    return x


def make_countdown(rng: random.Random) -> Problem:
    """Generate three or four numbers, and a target from a random expression whose values are positive integers."""
    while True:
        nums = [rng.randrange(1, MAX_COUNTDOWN) for _ in range(rng.choice((3, 4)))]
        parts = [(n, str(n)) for n in nums]
        while len(parts) > 1:
            (a, left), (b, right) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
            results = {"+": a + b, "*": a * b}
            if a > b:
                results["-"] = a - b
            if a % b == 0:
                results["/"] = a // b
            op = rng.choice(list(results))
            parts.append((results[op], f"({left} {op} {right})"))
        target, expression = parts[0]
        if target < MAX_COUNTDOWN and target not in nums:
            key = f"{target}:{','.join(map(str, sorted(nums)))}"
            prompt = COUNTDOWN_PROMPT.format(target, ", ".join(map(str, nums)))
            return Problem("countdown", key, prompt, (), expression[1:-1], target=target, nums=tuple(nums))


MAKERS = {
    "sums": make_sum,
    "words": make_word_problem,
    "functions": make_function,
    "big_sums": partial(make_sum, family="big_sums", low=10, high=99, terms=(2, 3, 4)),
    # Longer than the sums that the bundled model was pretrained on; and even longer ones, to test generalization.
    "long_sums": partial(make_sum, family="long_sums", low=10, high=99, terms=(5,)),
    "longer_sums": partial(make_sum, family="longer_sums", low=10, high=99, terms=(6, 7)),
    "countdown": make_countdown,
}


def problems(family: str, split: str, rng: random.Random):
    """Yield problems of one family and split, without end."""
    while True:
        problem = MAKERS[family](rng)
        if assign_split(family, problem.key) == split:
            yield problem


def questions(family: str, split: str, n: int, seed: int) -> list[dict]:
    """Generate n rows of one family and split with distinct prompts: id, prompt, task, level and `Problem.columns`.

    Raises ValueError if the family does not have that many.
    """
    rows = []
    seen = set()
    repeats = 0
    for problem in problems(family, split, random.Random(f"{family}/{split}/{seed}")):
        if problem.prompt in seen:
            repeats += 1
            if repeats > 3 * n + 1000:
                raise ValueError(f"the family {family} does not have {n} different {split} questions: request fewer")
            continue
        seen.add(problem.prompt)
        row = {"id": f"{family}-{split}-{seed}-{len(rows)}", "prompt": problem.prompt, "task": family}
        row["level"] = len(problem.ops or problem.nums)
        rows.append(row | problem.columns())
        if len(rows) == n:
            return rows
