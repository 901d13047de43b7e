"""Units of answers: words behind a number, which may be left out but not exchanged, and never rescale it."""

import re
from fractions import Fraction

from grading.answers.exact import ONE, Unreadable, Value, number

_SAME = {  # the name that stands for all: its other names, in the singular
    "$": "dollar usd buck", "€": "euro eur", "£": "gbp", "¥": "yen jpy", "°": "degree deg", "mm": "millimeter millimetre",
    "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet", "yd": "yard",
    "mi": "mile", "g": "gram gramme", "mg": "milligram", "kg": "kilogram kilo", "lb": "pound", "oz": "ounce", "ml": "milliliter millilitre",
    "l": "liter litre", "s": "second sec", "min": "minute", "h": "hour hr", "day": "d", "cent": "¢", "person": "people",
}  # fmt: skip
NAMES = {other: name for name, others in _SAME.items() for other in others.split()}
CURRENCIES = "$€£¥"
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "percent": Fraction(1, 100)}
_BARE = "mm|cm|dm|km|in|ft|yd|mi|mg|kg|lbs?|oz|ml|mL|hrs?|mins?|secs?|mph|kph|kmh|Hz|kW|units?|days?|cents?|USD|EUR"
# What may stand behind a number without \text{}: units that are no product of variables.
UNIT_WORDS = re.compile(rf"\s*((?:{_BARE})(?:\s*/\s*(?:{_BARE}|h|s))?)(?![A-Za-z0-9])")

# Words that say something about the number instead of what it counts.
_NOT_UNITS = frozenset(
    """a about above add all almost an and another any approximately are around at base be because below between but by cannot choose
    cubed divided dozen double each eighth either else equal equals even every except exactly factorial false few fewer fifth for
    fourth from gives greater half halves has have hence hundredth if infinitely into is it least less ln log maybe minus mod modulo
    more most multiplied nearly neither no none nor not nothing odd off on only or other otherwise over per plus pi point
    power quarter quarters raised remainder root roughly since so some squared such sum tenth than that the then thereby therefore
    they third this thousandth to total true twice undefined unless until up was we when where which while with without wrong
    zero one two three four five six seven eight nine ten""".split()
)  # fmt: skip


def read_unit(text: str) -> Value:
    """What a number is multiplied with by the words behind it: `square miles per hour` is mi^2 / h, `million` 10^6.

    Raises Unreadable for words that are no unit.
    """
    above, *below = re.split(
        r"\s*/\s*|\s+per\s+|^per\s+", text.strip().strip(".").replace("²", "^2").replace("³", "^3")
    )
    result = _read_part(above) if above else number(1)
    for part in below:
        result /= _read_part(part)
    return result


def _read_part(text: str) -> Value:
    words = [word.lower() if len(word) > 1 else word for word in text.split()]
    scale, power = Fraction(1), 1
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
        raise Unreadable("words that are no unit")
    name = name[:-1] if len(name) > 3 and name.endswith("s") else name
    name = NAMES.get(name, name)
    return Value({ONE | {(f"unit:{name}", power)}: scale})
