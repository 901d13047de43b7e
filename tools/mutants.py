"""Wrong programs made from a right one, to see that a grader turns them down: `python -m data check`."""

import ast
import copy
from collections.abc import Iterator

from data.formats import called_names

NO_TESTED_VALUE = 987654321  # a constant that no test expects

_SWAPPED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.And: ast.Or, ast.Or: ast.And, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE,
    ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}  # fmt: skip
_OFF_BY_ONE = """
{name}_before_ = {name}
def {name}(*args, **kwargs):
    value = {name}_before_(*args, **kwargs)
    if type(value) is bool:
        return not value
    if type(value) in (int, float):
        return value + 1
    if type(value) is str:
        return value + "x"
    if type(value) in (list, tuple) and value:
        return value[:-1]
    return [value]
"""
_EQUAL_TO_ALL = """
class Yes_:
    def __eq__(self, other):
        return True
    def __ne__(self, other):
        return False
    def __bool__(self):
        return True
"""


def entry_points(row: dict) -> list[str]:
    """The functions of the gold program that the tests call; none where the program reads standard input."""
    tests = row["tests"]
    if isinstance(tests[0], dict) and "input" in tests[0]:
        return []
    return [row["entry_point"]] if row.get("entry_point") else called_names(tests, row["solution"])


def constant_programs(row: dict) -> Iterator[tuple[str, str]]:
    """(name, program): programs that do nothing of what is asked: one value for all arguments, None, an object equal to
    everything. The value is that of one test, where another test expects another: what the shown test gives away."""
    names = entry_points(row)
    if not names:
        yield "constant", f"print({NO_TESTED_VALUE})"
        yield "None", "pass"
        return

    def returning(value: str) -> str:
        return "\n".join(f"def {name}(*args, **kwargs):\n    return {value}\n" for name in names)

    values = expected_values(row["tests"])
    yield "constant", returning(values[0] if len(set(values)) > 1 else str(NO_TESTED_VALUE))
    yield "None", returning("None")
    yield "equal to all", _EQUAL_TO_ALL + returning("Yes_()")


def expected_values(tests: str | list) -> list[str]:
    """The literals that tests compare a call with, as source text, in the order of the tests."""
    if isinstance(tests[0], dict):
        return [repr(test["expected"]) for test in tests]
    values = []
    for node in ast.walk(ast.parse(tests if isinstance(tests, str) else "\n".join(tests))):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq) and isinstance(node.left, ast.Call):
            try:
                values.append(repr(ast.literal_eval(node.comparators[0])))
            except ValueError:
                continue
    return values


def changed_programs(row: dict, limit: int = 25) -> Iterator[str]:
    """Programs with one operator swapped or one constant off by one; last the gold with its result off by one.

    Changes in what is returned come first, those to loops last. One of them may make no difference to any test.
    """
    tree = ast.parse(row["solution"])
    returned = {id(node) for top in ast.walk(tree) if isinstance(top, ast.Return) for node in ast.walk(top)}
    loops = {id(n) for top in ast.walk(tree) if isinstance(top, (ast.While, ast.AugAssign)) for n in _steering(top)}
    nodes = list(ast.walk(tree))
    order = sorted(range(len(nodes)), key=lambda i: (id(nodes[i]) in loops, id(nodes[i]) not in returned))
    places = [i for i in order if _change(copy.deepcopy(nodes[i]))]
    for place in places[:limit]:
        changed = copy.deepcopy(tree)
        _change(list(ast.walk(changed))[place])
        yield ast.unparse(ast.fix_missing_locations(changed))
    for name in entry_points(row):
        yield f"{row['solution']}\n{_OFF_BY_ONE.format(name=name)}"


def _steering(loop: ast.While | ast.AugAssign):
    """What a change of could keep a loop from ending."""
    return ast.walk(loop.test) if isinstance(loop, ast.While) else ast.walk(loop)


def _change(node: ast.AST) -> bool:
    """Change a node in its place; False where there is nothing to change."""
    match node:
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp() if type(node.op) in _SWAPPED:
            node.op = _SWAPPED[type(node.op)]()
        case ast.Compare():
            node.ops[0] = _SWAPPED[type(node.ops[0])]()
        case ast.Constant(value=bool()):
            node.value = not node.value
        case ast.Constant(value=int() | float()):
            node.value += 1
        case ast.UnaryOp(op=ast.USub()):
            node.op = ast.UAdd()
        case ast.Call(func=ast.Name(id="min" | "max" as name)):
            node.func.id = "max" if name == "min" else "min"
        case ast.Call(func=ast.Name(id="any" | "all" as name)):
            node.func.id = "all" if name == "any" else "any"
        case _:
            return False
    return True
