"""Texts as Markdown: HTML, mathematics, code, prices and products. The search takes linear time."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ui.text import LATEX, MAX_TEXT_LENGTH, cut, fenced, plain, to_markdown


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<b>3</b> & 4 < 5 &amp; &#38;", "&lt;b>3&lt;/b> & 4 < 5 &amp;amp; &amp;#38;"),
        ("<think>so</think>7", "&lt;think>so&lt;/think>7"),
        ("$x^2$ and $$y<z$$ and \\(a\\) and \\[b\\]", "\\(x^2\\) and $$y&lt;z$$ and \\(a\\) and \\[b\\]"),
        ("it costs $5 and $6, or $5/$6 each", "it costs $5 and $6, or $5/$6 each"),
        ("\\boxed{\\frac{1}{2}}", "\\(\\boxed{\\frac{1}{2}}\\)"),
        ("$\\boxed{3}$", "\\(\\boxed{3}\\)"),
        ("\\boxed{never closed", "\\boxed{never closed"),
        ("2*3*4 = (2)*(12), **bold** and a * b", "2\\*3\\*4 = (2)\\*(12), **bold** and a * b"),
        ("```python\nx = '<b>' * 2*3\n```", "```python\nx = '<b>' * 2*3\n```"),
        ("`<b>` $", "`<b>` $"),
        ("```\nnot closed <b>", "```\nnot closed <b>"),
        ("", ""),
    ],
)
def test_markdown_of_a_text(text, expected):
    assert to_markdown(text) == expected


@given(st.text(alphabet="ab<>/&;#`$\\()[]{}*\n 1", max_size=60))
def test_no_tag_outside_of_code(text):
    outside = re.sub(r"```.*?(?:```|\Z)|`[^`\n]+`", "", to_markdown(text), flags=re.DOTALL)
    assert not re.search(r"<[a-zA-Z/!?]", outside)


@pytest.mark.parametrize("text", ["\\(", "$$", "\\boxed{", "`", "$a", "```", "\\boxed{{", "<", "&", "*a"])
def test_long_hostile_texts_are_fast(text):
    start = time.perf_counter()
    shown = to_markdown(text * (MAX_TEXT_LENGTH // len(text)))
    assert time.perf_counter() - start < 2 and len(shown) < 6 * MAX_TEXT_LENGTH


def test_long_texts_are_cut():
    assert to_markdown("x" * (MAX_TEXT_LENGTH + 5)).endswith("x … (5 more characters are not shown)")
    assert cut("abc", 3) == "abc"


@given(st.text(max_size=40))
def test_plain_text_has_no_markup(text):
    assert not set(plain(text)) & set("<>*_`$[]()\\|{}\n")
    assert not any(left in plain(text) for left, _, _ in LATEX)


def test_a_fence_is_longer_than_the_fences_in_the_text():
    assert fenced("a ```` b") == "`````text\na ```` b\n`````" and fenced("x") == "```text\nx\n```"
