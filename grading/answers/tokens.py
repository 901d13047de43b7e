r"""Normalization of an answer's text, and the tokenizer.

`tidy` removes everything that does not change the meaning of an answer (math delimiters, spacing, synonyms of commands,
text commands around a number), and `tokenize` splits the rest for the parser in grading/answers/structures.py.
"""

import re
from fractions import Fraction

from grading.answers.exact import Value, number
from grading.answers.terms import ParseError
from grading.answers.units import CURRENCIES, CURRENCY_CODES, UNIT_WORDS

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "√": r"\sqrt ", "π": r"\pi ",
        "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
        "∅": r"\emptyset ", "±": r"\pm ", "°": r"^\circ ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}", "ℝ": r"\mathbb{R}", "θ": r"\theta ", "…": r"\ldots ", "\u00a0": " ", "\u2009": " ",
        "\u202f": " ", "\n": " ", "\t": " ", "~": " ", "、": ",", "。": ".", "\u3000": " ",
        "￥": "¥", "￡": "£", "￦": "₩", "\u2010": "-", "\u2011": "-",
    }
    | {chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)}  # full-width characters
)  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_COMMANDS = {
    other: name
    for name, others in {
        "": "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits vec hat underline bm boldsymbol bf tt bold large Large LARGE huge Huge small",
        " ": "quad qquad",
        r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom tbinom", r"\le": "leq leqslant", r"\ge": "geq geqslant", r"\ne": "neq",
        r"\emptyset": "varnothing", r"\ldots": "dots cdots dotsc", r"^\circ": "degree deg", "|": "lvert rvert vert mid",
        r"\text": "textbf textit textrm textnormal textsf texttt emph mbox hbox operatorname",
        r"\setminus": "backslash",
        "<": "lt", ">": "gt", "(": "langle", ")": "rangle", r"\{": "lbrace", r"\}": "rbrace",
    }.items()
    for other in others.split()
}  # fmt: skip
_COMMAND = re.compile(
    r"\\(?P<empty>(?:left|right)\s*\.|(?:text)?color\s*(?:\[\w+\])?\s*\{[\w!#]+\})"
    r"|\\math(?:bf|it|sf|rm|cal|tt)\s*(?:\{(?P<letter>[A-Za-z])\}|(?P<words>(?=\{\s*(?:[A-Za-z]{2}|[A-Za-z]/|\([A-J]\))[^{}\\+=]*\}))|(?P<group>))"
    r"|\\(?P<name>[A-Za-z]+)"
)


def _replace_command(match: re.Match) -> str:
    """Return the synonym of a command. A font command is \\text around words and removed around a letter or formula."""
    if match["letter"]:
        return f" {match['letter']} "
    return r"\text" if match["words"] is not None else _COMMANDS.get(match["name"], match[0]) if match["name"] else ""


_TIDY = [
    (re.compile(pattern, re.ASCII), replacement)
    for pattern, replacement in (
        (r"(?<=\d)(?:\{,\}|,\s*\\!)\s*(?=\d{3})", ""),  # 10{,}080 and 10,\!080
        (r"\\!", ""),
        (r"(?<!\\)\\[,;: ]", " "),
        (_COMMAND.pattern, _replace_command),
        (r"\.\.\.+", r"\\ldots "),
        (
            r"\\(frac|binom)\s*(\d)\s*(?:(\d)(?!\d)|(?=\{))",
            lambda m: f"\\{m[1]}{{{m[2]}}}" + (f"{{{m[3]}}}" if m[3] else ""),
        ),
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
_TIDY_UNITS = [
    (re.compile(pattern, re.ASCII), replacement)
    for pattern, replacement in (
        (rf"\\text\s*\{{\s*(\\?[{CURRENCIES}]|[A-Z][A-Za-z]{{1,2}}\.?)\s*\}}\s*(?=\d)", r"\1"),  # \text{\$}13
        (r"(\^\s*\{?\\circ\s*\}?)\s*([CF])\b", r"\1\\text{\2}"),  # Celsius, Fahrenheit
        (r"\\text\s*\{([^{}]*)\}\s*/\s*\\text\s*\{([^{}]*)\}", r"\\text{\1/\2}"),  # \text{km}/\text{h}
        (r"\\frac\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}", r"\\text{\1/\2}"),
    )
]
_QUALIFIER = re.compile(  # the set of a parameter: k \in Z in \pi + k\pi, k \in Z
    r"(?<=[\w})])\s*(?:[,;(]|(?=\\text)|\\quad)\s*(?:\\text\s*\{[,; ]*(?:where|for|with|for (?:some|any|all|every)(?: integers?)?)?"
    r"\s*\})?\s*\(?\s*[a-zA-Z]\s*(?:\\in\s*(?:\\mathbb\s*)?\{?[ZNQ]\}?(?:\^\{?[+*]\}?)?|\\text\s*\{ *(?:is )?an integer *\})\s*\)*$"
)
_CURRENCY_CODE = re.compile(rf"({'|'.join(map(re.escape, CURRENCY_CODES))})\s*(?=\d)")
_WRAPPED = re.compile(r"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]|\\text\s*\{([^{}]*)\}")


def tidy(text: str) -> str:
    """Normalize an answer: remove or replace everything that does not change its meaning."""
    text = text.translate(_CHARACTERS).strip(" *`")
    if not (text.isascii() and text.isalnum()):
        for pattern, replacement in _TIDY:
            text = pattern.sub(replacement, text)
    if "\\text" in text or "\\circ" in text:
        for pattern, replacement in _TIDY_UNITS:
            text = pattern.sub(replacement, text)
    if (text.count("$") - text.count("\\$")) % 2:  # a single dollar sign is a currency
        text = re.sub(r"(?<!\\)\$", r"\\$", text, count=1)
    while wrapped := _WRAPPED.fullmatch(text := text.strip().rstrip(".,; *`")):
        inner = next(group for group in wrapped.groups() if group is not None)
        if "$" in inner.replace("\\$", ""):
            break
        text = inner
    text = re.sub(r"(?<!\\)\$", "", text).lstrip("= ").removeprefix(r"\approx").lstrip()
    if text[:1].isupper() and (code := _CURRENCY_CODE.match(text)):
        text = CURRENCY_CODES[code[1]] + text[code.end() :]
    if "\\in" in text or "integer" in text:
        text = _QUALIFIER.sub("", text)
    return text


# --- tokens

_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+", re.ASCII)
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d*)?", re.ASCII)
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", re.ASCII)
_MIXED = re.compile(r"(\d+) +(\d+)/(\d+)(?![\d.])", re.ASCII)
_POWER_OF_TEN = re.compile(
    r"[eE]([+-]?\d{1,4})(?![\w.])|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([+-]?\d{1,4})\s*\}|([+-]?\d{1,4}))",
    re.ASCII,
)
_WORDS_TO_THE_END = re.compile(
    r"\s+([A-Za-z]{4,}(?:[ /][A-Za-z/]+){0,3}|(?!per )[A-Za-z]{3}(?: [A-Za-z]{3,}){1,3})\s*$"
)
_FOREIGN_WORDS = re.compile(r"\s*((?:[^\W\d_]{2,}|[\u3040-\u9fff\uac00-\ud7af])(?: [^\W\d_]+){0,3})\s*$")
_TOKEN = re.compile(
    rf"\\text\s*\{{([^{{}}]*)\}}|\\[A-Za-z]+|\\.|[A-Za-z]+|[-+*/^_!=<>(){{}}\[\]|,;:%'&{CURRENCIES[1:]}]"
)
MAX_POWER_OF_TEN = 4000

_PLAIN = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp sqrt pi"  # also without a backslash
WORDS = {name: f"\\{name}" for name in _PLAIN.split()} | {"or": "or", "and": "and"}
WORDS |= dict.fromkeys(("inf", "infty", "infinity"), r"\infty")
OPENING, CLOSING = ("(", "[", r"\{"), (")", "]", r"\}")


def tokenize(text: str, grouping: bool) -> list[tuple[str, object]]:
    """Split a tidied answer into tokens.

    Args:
        text: Output of `tidy`.
        grouping: Whether commas group digits, so that 1,080 outside of brackets is one number, not two.

    Returns:
        Pairs (kind, value). The kind is number (with a Value), text (words in a text command or after a number), word,
        name (one letter), end (the last token), or the command or sign itself. Raises ParseError.
    """
    tokens = []
    position = 0
    depth = 0
    while position < len(text):
        last = tokens[-1][0] if tokens else ""
        words = last in ("number", "}", r"\pi") and _WORDS_TO_THE_END.match(text, position)
        if words and words[1].split()[0] not in WORDS:
            match, token = words, ("text", words[1])
        elif (
            last == "number"
            and not text.isascii()
            and (match := _FOREIGN_WORDS.match(text, position))
            and not match[0].isascii()
        ):
            token = "text", match[1]
        elif last == "number" and (match := UNIT_WORDS.match(text, position)):
            token = "text", match[1]
        elif text[position].isspace():
            position += 1
            continue
        elif match := _REPEATING.match(text, position):
            token = "number", _repeating_decimal(*match.groups())
        elif match := _MIXED.match(text, position):
            whole, numerator, denominator = map(int, match.groups())
            if not numerator < denominator:
                raise ParseError("neither a mixed number nor a product")
            token = "number", number(whole + Fraction(numerator, denominator))
        elif match := (grouping and not depth and _GROUPED.match(text, position)) or _NUMBER.match(text, position):
            digits = match[0].replace(",", "")
            power = _POWER_OF_TEN.match(text, match.end())
            match = power or match
            token = "number", _decimal(digits, int(next(filter(None, power.groups()))) if power else 0)
        elif match := _TOKEN.match(text, position):
            token = _make_token(match, match[0] == text)
            depth += (token[0] in OPENING) - (token[0] in CLOSING)
        else:
            raise ParseError(f"an unknown character {text[position]!r}")
        position = match.end()
        if token[0] == "letters":
            tokens += [("name", letter) for letter in token[1]]
        else:
            tokens.append(token)
    return [*tokens, ("end", "")]


def _make_token(match: re.Match, is_whole: bool) -> tuple[str, str]:
    """Return the token for a match of _TOKEN, which may be the whole answer; `letters` are a product of variables."""
    token, text = match[0], match[1]
    if text is not None:
        separator = text.strip(" ,").lower()
        return (separator or ",", separator) if separator in ("", "or", "and") else ("text", text.strip())
    if token in WORDS:
        return WORDS[token], token
    if token[0].isalpha():  # a word, or a product of variables
        return "word" if len(token) > 3 or (len(token) == 3 and is_whole) else "letters", token
    return token, token


def _decimal(text: str, power: int) -> Value:
    """Return the decimal times 10^power, with the number of its significant digits."""
    if abs(power) > MAX_POWER_OF_TEN:
        raise ParseError("a number of extreme magnitude")
    digits = len(text.replace(".", "").lstrip("0")) if "." in text else 0
    return number(Fraction(text) * Fraction(10) ** power, digits)


def _repeating_decimal(whole: str, fixed: str, repeated: str) -> Value:
    """Return the value of a repeating decimal such as 0.1\\overline{6}."""
    tail = Fraction(int(repeated), 10 ** len(fixed) * (10 ** len(repeated) - 1))
    return number(Fraction(f"{whole or 0}.{fixed or 0}") + tail)
