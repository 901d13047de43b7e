"""Units: words after a number. An answer may omit or add a unit, but not change it; units are never converted."""

import re
from fractions import Fraction

from grading.answers.exact import Value, number
from grading.answers.terms import ONE, ParseError

_SYNONYMS = {  # canonical name: its synonyms, in the singular
    "$": "dollar usd buck", "€": "euro eur", "£": "gbp", "¥": "yen jpy 円", "₹": "rupee inr rs", "yuan": "rmb cny 元",
    "cent": "¢", "°": "degree deg", "%": "percent pct", "mm": "millimeter millimetre", "cm": "centimeter centimetre",
    "dm": "decimeter decimetre", "m": "meter metre", "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet",
    "yd": "yard", "mi": "mile", "g": "gram gramme gm", "mg": "milligram", "kg": "kilogram kilo", "lb": "pound", "oz": "ounce",
    "ml": "milliliter millilitre", "l": "liter litre ltr L", "gal": "gallon", "qt": "quart", "pt": "pint", "tbsp": "tablespoon",
    "tsp": "teaspoon", "s": "second sec", "min": "minute", "h": "hour hr", "day": "d", "week": "wk", "month": "mo", "year": "yr",
    "person": "people", "child": "children", "man": "men", "woman": "women", "kwh": "kilowatt-hour", "w": "watt", "kw": "kilowatt",
    "j": "joule", "kj": "kilojoule", "n": "newton", "v": "volt", "hz": "hertz", "pc": "piece",
}  # fmt: skip
_CANONICAL = {other: name for name, others in _SYNONYMS.items() for other in others.split()}
_SPEEDS = {"mph": "mi/h", "mps": "m/s", "fps": "ft/s", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "psi": "lb/in^2"}
CURRENCY_CODES = {
    "USD": r"\$",
    "US$": r"\$",
    r"US\$": r"\$",
    "EUR": "€",
    "GBP": "£",
    "INR": "₹",
    "Rs": "₹",
    "Rs.": "₹",
}  # before a number
CURRENCIES = "$€£¥₹₩₽₺₫₪฿₴₦₱¢"
_PERCENT_WORDS = re.compile(r"per ?cent(?:age)?(?: points?)?\b", re.IGNORECASE)
_TOTAL = re.compile(r"(?:^|\s+)(?:in total|in all|altogether|overall|total)$")
PERCENT = frozenset({("unit:%", 1)})
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES |= {"十": 10, "百": 100, "千": 1000, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_KILO = ("千克", "千米", "千瓦", "千卡")  # kilogram, kilometer, kilowatt, kilocalorie
_FOREIGN_NOT_UNITS = re.compile(  # half, many, a few, not, about, or, to, times, dozen, 10^12, thousand ...
    "[半多几不非约以之至或和到比倍打兆천만억0-9]|тыс|миллион|дюжин|половин"
)
# Short units with other letters than these could be products of variables.
_UNIT = (
    "mm|cm|dm|km|in|ft|yds?|mi|mg|kgs?|lbs?|oz|ml|mL|hr|kW|kN|kJ|Hz|dB|[kKMGT]B|(?i:per\\s?cent|pct|gms|hrs|gal|qts|tbsp|tsp|mins?|secs?|"
    "wks|yrs|mph|mps|kph|kmp?h|fps|psi|rpm|[kmg]hz|kwh|kcal|cal|kpa|mol|pcs|pts|cup|men|tons?|units?|days?|cents?|usd|eur|gbp|inr|cny|rmb)"
)
# Units that are recognized after a number without \\text{}.
UNIT_WORDS = re.compile(
    rf"\s*((?:(?:sq|cu)\.?\s*)?(?:{_UNIT})\b\.?(?:\s*/\s*(?:{_UNIT}|[hms]|hour|minute|second)\b)?|g\s*/\s*(?:cm|m[lL])(?![A-Za-z0-9])|"
    r"m\s*/\s*(?:s|sec|h|min)(?![A-Za-z0-9])|(?:[mck]?m|in|ft|yd)[23]\b|(?:sq|square)\.? (?:units?|meters?|m|feet|inches|miles))(?![A-Za-z0-9])"
)

# Words that modify or describe the number instead of being a unit.
_NOT_UNITS = frozenset(
    """a about above add all almost an and another any approximately are around at base be because below between but by cannot choose
    cubed divided dozen double each eighth either else equal equals even every except exactly factorial false few fewer fifth for
    fourth from gives greater half halves has have hence hundredth if infinitely into is it least less ln log maybe minus mod modulo
    more most multiplied nearly neither no none nor not nothing odd off on only or out other otherwise over per plus pi point
    power quarter quarters raised remainder root roughly since so some squared such sum tenth than that the then thereby therefore
    they third this thousandth to total true twice undefined unless until up was we when where which while with without wrong
    zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixth seventh ninth twelfth sixteenth
    twentieth negative lakh crore quadrillion quintillion score gross grand dutzend
    millionen millon millones millón milliard milliarden millier mille docena douzaine medio demi mil mio mrd bn mn k M B e x""".split()
)  # fmt: skip


def parse_unit(text: str) -> Value:
    """Return the factor denoted by the words after a number: `square miles per hour` is mi^2 / h, `million` is 10^6.

    Raises ParseError if the words are not a unit.
    """
    text = text.strip().strip(".").replace("²", "^2").replace("³", "^3")
    text = _TOTAL.sub("", _PERCENT_WORDS.sub("percent", text))
    numerator, *denominators = re.split(r"\s*/\s*|\s+per\s+|^per\s+", _SPEEDS.get(text.lower(), text))
    result = _parse_factor(numerator) if numerator else number(1)
    for denominator in denominators:
        result /= _parse_factor(denominator)
    return result


def _parse_factor(text: str) -> Value:
    """Parse a unit without division, such as `thousand square meters` or `cm^2`."""
    words = [word.lower() if len(word) > 1 else word for word in text.split()]
    words = [word.rstrip(".") for word in words]
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
    while name and name[0] in _SCALES and not name.isascii() and name[:2] not in _KILO:  # 5万元
        scale *= _SCALES[name[0]]
        name = name[1:]
    if not name and scale != 1:
        return number(scale)
    is_name = re.fullmatch(rf"[^\W\d_]+(?:[ -][^\W\d_]+){{0,3}}|[{CURRENCIES}°%]", name)
    if (
        not is_name
        or _FOREIGN_NOT_UNITS.search(name)
        or not _NOT_UNITS.isdisjoint([*words, *(word.rstrip("s") for word in words if word != "points")])
    ):
        raise ParseError("words that are not a unit")
    name = name.replace("kilowatt hour", "kilowatt-hour")
    singular = name[:-1] if name.endswith("s") else name
    if len(name) > 3 or singular in _CANONICAL or singular in _SYNONYMS and len(singular) > 1:
        name = singular
    name = _CANONICAL.get(name, name)
    return Value({ONE | {(f"unit:{name}", power)}: scale})


def without_percent(value: Value) -> Value:
    """Return 0.05 for 5 %, and other values unchanged."""
    magnitude, unit = value.split_unit()
    return magnitude * number(Fraction(1, 100)) if unit == PERCENT else value
