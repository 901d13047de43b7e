r"""An answer's text made uniform, and cut into tokens.

`tidy` takes off what does not change an answer (math delimiters, spacing, other names of the same command, words that
only wrap a number) and `tokens` cuts what is left for grading/answers/structures.py.
"""

import re
from fractions import Fraction

from grading.answers.exact import Unreadable, Value, number
from grading.answers.units import UNIT_WORDS

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "√": r"\sqrt ", "π": r"\pi ",
        "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
        "∅": r"\emptyset ", "±": r"\pm ", "°": r"^\circ ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}", "ℝ": r"\mathbb{R}", "θ": r"\theta ", "…": r"\ldots ", "\u00a0": " ", "\u2009": " ",
        "\u202f": " ", "\n": " ", "\t": " ", "~": " ",
    }
)  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_COMMANDS = {
    other: name
    for name, others in {
        "": "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits vec hat underline bm boldsymbol bf large Large",
        " ": "quad qquad",
        r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom tbinom", r"\le": "leq leqslant", r"\ge": "geq geqslant", r"\ne": "neq",
        r"\emptyset": "varnothing", r"\ldots": "dots cdots dotsc", r"^\circ": "degree deg", "|": "lvert rvert vert mid",
        r"\text": "mathrm textbf textit textrm textnormal textsf texttt mbox hbox operatorname mathbf mathit mathsf",
        r"\setminus": "backslash",
        "<": "lt", ">": "gt", "(": "langle", ")": "rangle", r"\{": "lbrace", r"\}": "rbrace",
    }.items()
    for other in others.split()
}  # fmt: skip
_COMMAND = re.compile(r"\\(left|right)\s*\.|\\(math(?:bf|it|sf|cal))\s*\{([A-Za-z])\}|\\([A-Za-z]+)")
_TIDY = [
    (re.compile(pattern, re.ASCII), to)
    for pattern, to in (
        (r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3})", ""),  # 10{,}080 and 10,\!080
        (r"\\!", ""),
        (r"(?<!\\)\\[,;: ]", " "),
        (_COMMAND.pattern, lambda m: "" if m[1] else f" {m[3]} " if m[2] else _COMMANDS.get(m[4], m[0])),
        (r"\.\.\.+", r"\\ldots "),
        (r"\\frac\s*(\d)\s*(?:(\d)(?!\d)|(?=\{))", lambda m: f"\\frac{{{m[1]}}}" + (f"{{{m[2]}}}" if m[2] else "")),
        (r"\\text\s*\{([ei])\}", r" \1 "),
        (r"\\text\s*\{\s*\(?([-+]?[\d.,/ ]+)\)?\s*\}", r"\1"),  # \text{13}
        (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\*\*", "^"),
        (r"([<>])=", lambda m: r"\le " if m[1] == "<" else r"\ge "),
        (
            r"[⁰¹²³⁴-⁹⁻]+",
            lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}" if len(m[0]) > 1 else "^" + m[0].translate(_SUPERSCRIPTS),
        ),
        (r"(?<![\d.,^_}])\d{1,3}(?: \d{3})+(?! ?[\d/,])", lambda m: m[0].replace(" ", "")),  # 1 000 000
    )
]
_WRAPPED = re.compile(r"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]|\\text\s*\{([^{}]*)\}")


def tidy(text: str) -> str:
    """Text without what does not change an answer."""
    text = text.translate(_CHARACTERS).strip(" *`")
    if not (text.isascii() and text.isalnum()):
        for pattern, to in _TIDY:
            text = pattern.sub(to, text)
    if (text.count("$") - text.count("\\$")) % 2:  # a dollar sign alone is money
        text = re.sub(r"(?<!\\)\$", r"\\$", text, count=1)
    while wrapped := _WRAPPED.fullmatch(text := text.strip().rstrip(".,; *`")):
        inner = next(group for group in wrapped.groups() if group is not None)
        if "$" in inner.replace("\\$", ""):
            break
        text = inner
    return re.sub(r"(?<!\\)\$", "", text).lstrip("= ")


# --- tokens

_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+", re.ASCII)
_GROUPED_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d*)?", re.ASCII)
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", re.ASCII)
_MIXED = re.compile(r"(\d+) +(\d+)/(\d+)(?![\d.])", re.ASCII)
_POWER_OF_TEN = re.compile(
    r"[eE]([+-]?\d{1,4})(?![\w.])|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([+-]?\d{1,4})\s*\}|([+-]?\d{1,4}))",
    re.ASCII,
)
_WORDS_TO_THE_END = re.compile(r"\s+([A-Za-z]{4,}(?: [A-Za-z/]+){0,3})\s*$")
_TOKEN = re.compile(r"\\text\s*\{([^{}]*)\}|\\[A-Za-z]+|\\.|[A-Za-z]+|[-+*/^_!=<>(){}\[\]|,;:%'&€£¥]")
MAX_POWER_OF_TEN = 4000

_PLAIN = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp sqrt pi"  # also without a backslash
WORDS = {name: f"\\{name}" for name in _PLAIN.split()} | {"or": "or", "and": "and"}
WORDS |= dict.fromkeys(("inf", "infty", "infinity"), r"\infty")
OPENING, CLOSING = ("(", "[", r"\{"), (")", "]", r"\}")


def tokens(text: str, grouped: bool) -> list[tuple[str, object]]:
    """Pairs (kind, value) with kinds number (a Value), text, word, name (one letter), end, and each command and sign.

    grouped: whether 1,080 is one number, where it stands in no brackets. Raises Unreadable.
    """
    found, place, depth = [], 0, 0
    while place < len(text):
        last = found[-1][0] if found else ""
        words = last in ("number", "}", r"\pi") and _WORDS_TO_THE_END.match(text, place)
        if words and words[1].split()[0] not in WORDS:
            match, token = words, ("text", words[1])
        elif last == "number" and (match := UNIT_WORDS.match(text, place)):
            token = "text", match[1]
        elif text[place].isspace():
            place += 1
            continue
        elif match := _REPEATING.match(text, place):
            token = "number", _repeating(*match.groups())
        elif match := _MIXED.match(text, place):
            whole, above, below = map(int, match.groups())
            if not above < below:
                raise Unreadable("neither a mixed number nor a product")
            token = "number", number(whole + Fraction(above, below))
        elif match := (grouped and not depth and _GROUPED_NUMBER.match(text, place)) or _NUMBER.match(text, place):
            digits = match[0].replace(",", "")
            power = _POWER_OF_TEN.match(text, match.end())
            match = power or match
            token = "number", _decimal(digits, int(next(filter(None, power.groups()))) if power else 0)
        elif match := _TOKEN.match(text, place):
            token = _token(match, match[0] == text)
            depth += (token[0] in OPENING) - (token[0] in CLOSING)
        else:
            raise Unreadable(f"an unknown character {text[place]!r}")
        place = match.end()
        if token[0] == "letters":
            found += [("name", letter) for letter in token[1]]
        else:
            found.append(token)
    return [*found, ("end", "")]


def _token(match: re.Match, is_all: bool) -> tuple[str, str]:
    token, text = match[0], match[1]
    if text is not None:
        joint = text.strip(" ,").lower()
        return (joint or ",", joint) if joint in ("", "or", "and") else ("text", text.strip())
    if token in WORDS:
        return WORDS[token], token
    if token[0].isalpha():  # a word, or a product of variables
        return "word" if len(token) > 3 or (len(token) == 3 and is_all) else "letters", token
    return token, token


def _decimal(text: str, power: int) -> Value:
    if abs(power) > MAX_POWER_OF_TEN:
        raise Unreadable("a number out of all proportion")
    digits = len(text.replace(".", "").lstrip("0")) if "." in text else 0
    return number(Fraction(text) * Fraction(10) ** power, digits)


def _repeating(whole: str, fixed: str, repeated: str) -> Value:
    tail = Fraction(int(repeated), 10 ** len(fixed) * (10 ** len(repeated) - 1))
    return number(Fraction(f"{whole or 0}.{fixed or 0}") + tail)
