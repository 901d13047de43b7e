"""Units: words after a number. An answer may omit or add a unit, but not change it; units are never converted."""

import re
from fractions import Fraction

from grading.answers.exact import ONE, ParseError, Value, number

_SYNONYMS = {  # canonical name: its synonyms, in the singular
    "$": "dollar usd buck", "€": "euro eur", "£": "gbp", "¥": "yen jpy", "°": "degree deg", "mm": "millimeter millimetre",
    "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet", "yd": "yard",
    "mi": "mile", "g": "gram gramme", "mg": "milligram", "kg": "kilogram kilo", "lb": "pound", "oz": "ounce", "ml": "milliliter millilitre",
    "l": "liter litre", "s": "second sec", "min": "minute", "h": "hour hr", "day": "d", "cent": "¢", "person": "people",
}  # fmt: skip
_CANONICAL = {other: name for name, others in _SYNONYMS.items() for other in others.split()}
CURRENCIES = "$€£¥"
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "percent": Fraction(1, 100)}
_UNIT = "mm|cm|dm|km|in|ft|yd|mi|mg|kg|lbs?|oz|ml|mL|hrs?|mins?|secs?|mph|kph|kmh|Hz|kW|units?|days?|cents?|USD|EUR"
# Units that are recognized after a number without \text{}, since they cannot be products of variables.
UNIT_WORDS = re.compile(rf"\s*((?:{_UNIT})(?:\s*/\s*(?:{_UNIT}|h|s))?)(?![A-Za-z0-9])")

# Words that modify or describe the number instead of being a unit.
_NOT_UNITS = frozenset(
    """a about above add all almost an and another any approximately are around at base be because below between but by cannot choose
    cubed divided dozen double each eighth either else equal equals even every except exactly factorial false few fewer fifth for
    fourth from gives greater half halves has have hence hundredth if infinitely into is it least less ln log maybe minus mod modulo
    more most multiplied nearly neither no none nor not nothing odd off on only or other otherwise over per plus pi point
    power quarter quarters raised remainder root roughly since so some squared such sum tenth than that the then thereby therefore
    they third this thousandth to total true twice undefined unless until up was we when where which while with without wrong
    zero one two three four five six seven eight nine ten""".split()
)  # fmt: skip


def parse_unit(text: str) -> Value:
    """Return the factor denoted by the words after a number: `square miles per hour` is mi^2 / h, `million` is 10^6.

    Raises ParseError if the words are not a unit.
    """
    numerator, *denominators = re.split(
        r"\s*/\s*|\s+per\s+|^per\s+", text.strip().strip(".").replace("²", "^2").replace("³", "^3")
    )
    result = _parse_factor(numerator) if numerator else number(1)
    for denominator in denominators:
        result /= _parse_factor(denominator)
    return result


def _parse_factor(text: str) -> Value:
    """Parse a unit without division, such as `thousand square meters` or `cm^2`."""
    words = [word.lower() if len(word) > 1 else word for word in text.split()]
    scale = Fraction(1)
    power = 1
    while words and (words[0] in _SCALES or words[0].rstrip("s") in _SCALES):
        scale *= _SCALES[words.pop(0).rstrip("s")]
    if words and words[0] in ("square", "sq", "sq.", "cubic", "cu"):
        power = 2 if words.pop(0).startswith("sq") else 3
    if words and (match := re.fullmatch(r"(.+?)\^?\{?([23])\}?", words[-1])):
        words[-1], power = match[1], int(match[2])
    if not words and scale != 1:
        return number(scale)
    name = " ".join(words)
    is_name = re.fullmatch(r"[^\W\d_]+(?: [^\W\d_]+){0,3}|[$€£¥°¢]", name)
    if not is_name or not _NOT_UNITS.isdisjoint([*words, *(word.rstrip("s") for word in words)]):
        raise ParseError("words that are not a unit")
    name = name[:-1] if len(name) > 3 and name.endswith("s") else name
    name = _CANONICAL.get(name, name)
    return Value({ONE | {(f"unit:{name}", power)}: scale})
