"""Texts of models as Markdown that shows them as they are, with mathematics and code. Does not import gradio."""

import re

MAX_TEXT_LENGTH = 20_000  # characters of a text shown on the page; downloads contain the full text
CELL_CHARS = 300  # characters of a text in a table
# Parts of a Markdown text: code, mathematics, and everything else. The limits keep the search fast.
PARTS = re.compile(
    r"(?P<code>```.*?(?:```|\Z)|`[^`\n]{1,2000}`)"
    r"|(?P<math>\$\$.{1,2000}?\$\$|\\\(.{1,2000}?\\\)|\\\[.{1,2000}?\\\])"
    r"|\$(?P<inline>(?=\S)[^$\n]{0,2000}?\S)\$(?!\d)"  # not "$5 and $6"
    r"|(?P<boxed>\\boxed\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})",
    re.DOTALL,
)
LATEX = [("$$", "$$", True), ("\\(", "\\)", False), ("\\[", "\\]", True)]
LATEX_DELIMITERS = [{"left": left, "right": right, "display": display} for left, right, display in LATEX]


def cut(text: str, limit: int = MAX_TEXT_LENGTH) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters are not shown)"


def plain(text: str) -> str:
    """Escape a text so that Markdown shows it as it is, in one line."""
    text = re.sub(r"[^\w\s.,:;?=/%·]|_", lambda match: f"&#{ord(match[0])};", " ".join(text.split()))
    return re.sub(r"^(\d+)\.(?=\s|$)", r"\1&#46;", text)  # not a list


def fenced(text: str) -> str:
    """Wrap a text in a Markdown code fence longer than any run of backticks in it."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", text)), 0)
    return f"{fence}text\n{text}\n{fence}"


def to_markdown(text: str) -> str:
    """Prepare a model's text for a Chatbot: HTML is shown as text, and LaTeX is marked for LATEX_DELIMITERS.

    Marks are added to `$...$`, which Gradio would also find in prices, and to a `\\boxed{}` outside of mathematics.
    """
    parts = []
    end = 0
    text = cut(text)
    for match in PARTS.finditer(text):
        parts.append(escape_text(text[end : match.start()]))
        end = match.end()
        if match["code"]:
            parts.append(match[0])
        elif match["math"]:
            parts.append(escape_html(match[0]))
        else:
            parts.append(f"\\({escape_html(match['inline'] or match['boxed'])}\\)")
    return "".join([*parts, escape_text(text[end:])])


def escape_html(text: str) -> str:
    """Escape tags and entities."""
    return re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", re.sub(r"&(?=#?\w+;)", "&amp;", text))


def escape_text(text: str) -> str:
    """Escape tags and entities, and the asterisks of products such as 2*3*4."""
    return re.sub(r"(?<=[\w)])\*(?=[\w(])", r"\\*", escape_html(text))
