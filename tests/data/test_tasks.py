"""Built-in families: disjoint splits, right answers, and the bundled model that was pretrained on them."""

import json
import random
import re
from pathlib import Path

import pytest

from data.tasks import FAMILIES, MAKERS, SPLITS, WORD_TEMPLATES, assign_split, problems, questions
from grading import grade_code, grade_math
from tools.make_tiny import GUESS_ACCURACY, THINKING_SHARE, demonstration, guess, make_tokenizer

TINY = Path("data/tiny")


SUMS = {"sums": range(3, 7), "big_sums": range(2, 5), "long_sums": range(5, 6), "longer_sums": range(6, 8)}


@pytest.mark.parametrize("family", [*FAMILIES, "long_sums", "longer_sums"])
def test_splits_are_disjoint_by_construction(family):
    """A question's split is a function of its key, and splits share no hash value, so no seed can mix them."""
    tenths = [tenth for tenths in SPLITS.values() for tenth in tenths]
    assert sorted(tenths) == list(range(10))  # each tenth belongs to exactly one split
    rng = random.Random(0)
    keys, prompts = {}, {}
    for split in SPLITS:
        drawn = [next(problems(family, split, rng)) for _ in range(1500)]
        assert all(assign_split(family, problem.key) == split for problem in drawn)
        keys[split], prompts[split] = {p.key for p in drawn}, {p.prompt for p in drawn}
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not (keys[a] & keys[b] or prompts[a] & prompts[b])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_has_only_one_key(family):
    """Otherwise one question could be in two splits under two keys."""
    rng, seen = random.Random(1), {}
    for _ in range(4000):
        problem = MAKERS[family](rng)
        assert seen.setdefault(problem.prompt, problem.key) == problem.key


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_are_seeded_and_unique(family):
    rows = questions(family, "eval", 150, seed=4)
    assert rows == questions(family, "eval", 150, seed=4) != questions(family, "eval", 150, seed=5)
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 150
    assert all(row["task"] == family for row in rows)


@pytest.mark.parametrize("family", SUMS)
def test_sums_are_right(family):
    """The answers, the level (the number of operations), and the number of terms and digits."""
    for row in questions(family, "train", 300, seed=0):
        expression = re.search(r"\d[\d +-]*\d", row["prompt"])[0]
        numbers = re.findall(r"\d+", expression)
        assert eval(expression, {"__builtins__": {}}) == int(row["answer"])
        assert len(numbers) in SUMS[family] and row["level"] == len(numbers) - 1
        assert {len(number) for number in numbers} == {1 if family == "sums" else 2}


def test_word_problems_are_right():
    """Parsed from the text: every sentence after the first adds or subtracts, and the total never falls below zero."""
    assert len(WORD_TEMPLATES) >= 12
    patterns = [
        (re.compile(re.escape(template).replace(r"\{who\}", r"\w+").replace(r"\{n\}", r"(\d)")), sign)
        for _, _, gains, losses, _ in WORD_TEMPLATES
        for sign, sentences in ((1, gains), (-1, losses))
        for template in sentences
    ]
    for row in questions("words", "train", 300, seed=0):
        opening, *events = re.findall(r"[^.]+\.", row["prompt"])
        total = int(re.search(r"\d", opening)[0])
        for event in events:
            signs = {(sign, m[1]) for pattern, sign in patterns if (m := pattern.fullmatch(event.strip()))}
            if len({sign for sign, _ in signs}) > 1:  # "takes 3" adds cards, but subtracts cookies
                name = next(name for name, start, *_ in WORD_TEMPLATES if _matches(start, opening))
                _, _, gains, losses, _ = next(t for t in WORD_TEMPLATES if t[0] == name)
                signs = {s for s in signs if any(_matches(x, event) for x in (gains if s[0] > 0 else losses))}
            ((sign, n),) = signs
            total += sign * int(n)
            assert total >= 0
        assert total == int(row["answer"])


def _matches(template, sentence):
    pattern = re.escape(template).replace(r"\{who\}", r"\w+").replace(r"\{n\}", r"\d")
    return re.fullmatch(pattern, sentence.strip())


def test_demonstrations_with_thinking_are_right_and_guesses_mostly_wrong():
    rng = random.Random(0)
    for family in FAMILIES:
        num_thinking = 0
        num_right_guesses = 0
        num_guesses = 0
        for _ in range(600):
            problem = next(problems(family, "pretrain", rng))
            text = demonstration(problem, rng)
            answer = text.split("</think>")[-1]
            if problem.tests:
                score, _ = grade_code(answer, list(problem.tests))
            else:
                score, _ = grade_math(answer, problem.answer)
            if text.startswith("<think>"):
                num_thinking += 1
                assert score == 1, (problem, text)
            else:
                num_guesses += 1
                num_right_guesses += score
        assert num_thinking / 600 == pytest.approx(THINKING_SHARE[family], abs=0.06)
        assert num_right_guesses / num_guesses == pytest.approx(GUESS_ACCURACY, abs=0.06)


def test_wrong_guesses_of_functions_lack_brackets():
    rng = random.Random(2)
    problem = next(p for p in problems("functions", "pretrain", rng) if "(" in p.answer)
    wrong = {guess(problem, rng) for _ in range(200)} - {problem.answer}
    assert wrong == {problem.answer.replace("(", "").replace(")", "")}


def test_the_bundled_model_is_small_and_fits_nf4():
    files = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert sum(files.values()) <= 8 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= set(files)
    config = json.loads((TINY / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    sizes = [config[k] for k in ("hidden_size", "intermediate_size", "vocab_size")]
    sizes += [config["head_dim"] * config[k] for k in ("num_attention_heads", "num_key_value_heads")]
    assert all(size % 64 == 0 for size in sizes)
    from safetensors import safe_open

    with safe_open(TINY / "model.safetensors", "pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]
    assert sum(s[0] * (s[1] if len(s) > 1 else 1) for s in shapes) <= 3_000_000


def test_the_tokenizer_is_character_level_and_reversible():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = "<think>7+5=12\n12-3=9</think>\\boxed{9}  def f(x):\n    return (x+4)*3"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text) - len("<think></think>") + 2
    assert tokenizer.decode(ids) == text
    assert make_tokenizer().get_vocab() == tokenizer.get_vocab()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>a</think>b"}] * 2
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered == "<|user|>Hi<|assistant|>b<|end|><|user|>Hi<|assistant|><think>a</think>b<|end|>"
