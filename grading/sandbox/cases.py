"""Parse the tests of a code row into cases, which keep the expected answers away from the model's program.

Four forms are supported:

    ["assert f(1) == 2", ...]                    calls with plain data; other asserts run in a separate sandbox
    "def check(candidate): ..."                  the same, with an entry_point (HumanEval)
    [{"args": [1], "expected": 2}, ...]          calls, with an entry_point
    [{"input": "1 2\\n", "output": "3\\n"}, ...]   programs on standard input and output
"""

import ast
import builtins
import functools
import json
import threading
from typing import NamedTuple


class Call(NamedTuple):
    """Call the function `name` with `args`. The result must be plain data equal to `expected`."""

    name: str
    args: tuple
    expected: object


class Check(NamedTuple):
    """Test code that must not raise. It calls the program's functions and classes in `names`.

    in_place: The tests read arguments after the call: changes that the program made to them are sent back.
    uses_objects: The tests use attributes of results or call them: results need not be plain data.
    unsupported: Why no tier can run the tests, or "".
    """

    source: str
    names: tuple[str, ...]
    in_place: bool = False
    uses_objects: bool = False
    unsupported: str = ""


class Script(NamedTuple):
    """Run the program with `input` as standard input. Its standard output must match `output`."""

    input: str
    output: str


Case = Call | Check | Script

# Modules that test code may use without an import, because programs often import them.
_MODULES = {"math", "re", "collections", "itertools", "functools", "string", "datetime", "random", "copy", "operator"}


def called_names(cases: tuple[Case, ...]) -> set[str]:
    """Return the names of the program's functions that the cases call."""
    names_per_case = [
        case.names if isinstance(case, Check) else (case.name,) for case in cases if not isinstance(case, Script)
    ]
    return {name for names in names_per_case for name in names}


def parse_tests(tests: str | list, entry_point: str | None = None, setup: str = "") -> tuple[Case, ...]:
    """Parse the tests of a row into cases. Scripts and other cases are not mixed in one row.

    Args:
        tests: The tests in one of the four forms above.
        entry_point: The name of the function under test, or an expression such as Solution().add.
        setup: Imports and helper functions that test code may use.

    Raises:
        ValueError: If a test has none of the four forms, or if no program could fail the tests.
    """
    if isinstance(tests, str):
        return _parse(tests, (), entry_point, setup)
    if not isinstance(tests, (list, tuple)):
        raise ValueError(
            f"tests must be a list of asserts or of dicts, or the source of a check function, not {tests!r:.80}"
        )
    return _parse("", tuple(t if isinstance(t, str) else json.dumps(t) for t in tests), entry_point, setup)


@functools.lru_cache(maxsize=20_000)
def _parse(check: str, tests: tuple[str, ...], entry_point: str | None, setup: str) -> tuple[Case, ...]:
    if not check.strip() and not tests:
        raise ValueError("the list of tests is empty: no program could fail, so none can pass")
    if check:
        return (
            _parse_check(check, entry_point, setup)
            if "def check(" in check
            else _parse_asserts((check,), entry_point, setup)
        )
    dicts = [test.startswith("{") for test in tests]
    if not any(dicts):
        return _parse_asserts(tests, entry_point, setup)
    cases = tuple(_parse_dict(json.loads(test), entry_point) for test in tests if test.startswith("{"))
    if not all(dicts) or len(set(map(type, cases))) > 1:
        raise ValueError("the tests of one row must all have one form: asserts, args and expected, or input and output")
    return cases


def _parse_dict(test: dict, entry_point: str | None) -> Case:
    if set(test) == {"input", "output"} and all(isinstance(value, str) for value in test.values()):
        return Script(test["input"], test["output"])
    if set(test) == {"args", "expected"} and isinstance(test["args"], list):
        if not entry_point:
            raise ValueError("tests with args and expected need the column entry_point, the name of the function")
        if not entry_point.isidentifier():  # such as Solution().add
            return _parse_asserts((f"assert {entry_point}(*{test['args']!r}) == {test['expected']!r}",), None, "")[0]
        return Call(entry_point, tuple(test["args"]), test["expected"])
    raise ValueError(
        f"a dict test needs input and output (both text), or args (a list) and expected, not {json.dumps(test)[:80]}"
    )


def _parse_asserts(tests: tuple[str, ...], entry_point: str | None, setup: str) -> tuple[Case, ...]:
    cases, code = [], []
    tests = [test if "\n" in test.strip() else test.strip() for test in tests]
    trees = [_tree(test) for test in tests]
    asserts = [any(isinstance(node, ast.Assert) for node in ast.walk(tree)) for tree in trees]
    for number, (test, tree) in enumerate(zip(tests, trees)):
        is_value = any(isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call) for node in tree.body)
        if tree.body and not is_value and not asserts[number] and any(asserts[number:]):  # prepares a later assert
            code.append(test)
            continue
        if not asserts[number]:
            raise ValueError(
                f"a test must contain an assert, such as `assert name(values) == value`, not {test.strip()[:80]!r}"
            )
        calls = [_as_call(node) for node in tree.body]
        if all(calls):
            cases += calls
        else:
            code.append(test)
    if code:
        known_names = _bound_names(_tree(setup)) | _bound_names(_tree("\n".join(code))) | set(dir(builtins))
        read = {node.id for test in code for node in ast.walk(_tree(test)) if isinstance(node, ast.Name)}
        modules = {name for name in read - known_names if name in _MODULES}
        names = (read - known_names - modules) | ({entry_point} & read if entry_point else set())
        source = "\n".join([*(f"import {name}" for name in sorted(modules)), setup, *code])
        if not names:
            raise ValueError(f"this test uses no function of the program: {code[0].strip()[:80]!r}")
        cases.append(_as_check(source, names))
    return tuple(cases)


def _parse_check(source: str, entry_point: str | None, setup: str) -> tuple[Case, ...]:
    if not entry_point:
        raise ValueError("tests with check(candidate) need the column entry_point, the name of the function")
    check = next((n for n in _tree(source).body if isinstance(n, ast.FunctionDef) and n.name == "check"), None)
    if check is None or len(check.args.args) != 1:
        raise ValueError("the tests define no function check(candidate)")
    candidate = check.args.args[0].arg
    if not any(isinstance(node, ast.Name) and node.id == candidate for node in ast.walk(ast.Module(check.body, []))):
        raise ValueError("check(candidate) never uses its candidate: no program could fail")
    calls = [_as_call(node) for node in check.body if not _is_docstring(node)]
    if entry_point.isidentifier() and calls and all(call and call.name == candidate for call in calls):
        return tuple(Call(entry_point, call.args, call.expected) for call in calls)
    names = _read_names(_tree(entry_point))  # a method such as Solution().add has the name of its class
    return (_as_check(f"{setup}\n{source}\ncheck({entry_point})", names, candidate),)


_parser_lock = threading.RLock()


def parse_python(source: str, mode: str = "exec") -> ast.AST:
    """Return the syntax tree of Python code.

    In Python 3.11, ast.parse raises SystemError if a garbage collection lets another thread parse meanwhile.
    """
    with _parser_lock:
        for attempt in range(5):
            try:
                return ast.parse(source, mode=mode)
            except SystemError:  # code outside of this lock was parsing too
                if attempt == 4:
                    raise ValueError("Python's parser failed") from None


def _tree(source: str) -> ast.Module:
    try:
        return parse_python(source.strip() if "\n" not in source.strip() else source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        kind = type(error).__name__
        excerpt = source.strip()[:80]
        raise ValueError(
            f"a test must be Python, such as `assert name(values) == value`; this one is invalid ({kind}): {excerpt!r}"
        ) from None


def _as_call(node: ast.stmt) -> Call | None:
    """Return `assert f(literals) == literal` as a Call, or None for any other statement."""
    match node:
        case ast.Assert(
            test=ast.Compare(
                left=ast.Call(func=ast.Name(id=name), args=args, keywords=[]), ops=[ast.Eq()], comparators=[right]
            )
        ):
            try:
                return Call(name, tuple(map(ast.literal_eval, args)), ast.literal_eval(right))
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                return None
    return None


def _as_check(source: str, names: set[str], candidate: str = "") -> Check:
    """Return test code as a case. candidate: the name of the function under test inside check()."""
    nodes = list(ast.walk(_tree(source)))
    callees = names | ({candidate} if candidate else set())
    results = _variables_with_results(nodes, callees)
    return Check(
        source,
        tuple(sorted(names)),
        in_place=_reads_changed_arguments(nodes, callees, results),
        uses_objects=_uses_objects(nodes, callees, results),
        unsupported=_unsupported_use(nodes, callees),
    )


def _calls(node: ast.AST, callees: set[str]) -> list[ast.Call]:
    return [n for n in ast.walk(node) if _is_named_call(n) and n.func.id in callees]


def _read_names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _variables_with_results(nodes: list[ast.AST], callees: set[str]) -> set[str]:
    """Return the variables that depend on a result of the program."""
    results = set()
    for node in nodes:
        if isinstance(node, ast.Assign) and (_calls(node.value, callees) or _read_names(node.value) & results):
            results.update(*map(_read_names, node.targets))
        if isinstance(node, (ast.For, ast.comprehension)) and _calls(node.iter, callees):
            results.update(_read_names(node.target))
    return results


def _uses_objects(nodes: list[ast.AST], callees: set[str], results: set[str]) -> bool:
    """Return True if the tests use a class, attributes of results, or results as functions."""
    if any(name[:1].isupper() for name in callees):
        return True
    for node in nodes:
        match node:
            case ast.Attribute(value=base) | ast.Call(func=ast.Call() as base) | ast.Call(func=ast.Name() as base):
                is_result = isinstance(base, ast.Name) and base.id in results
                if (
                    is_result
                    or (isinstance(base, ast.Call) and _calls(base.func, callees))
                    or base in _calls(base, callees)
                ):
                    return True
            case ast.FunctionDef(decorator_list=decorators) if any(_read_names(d) & callees for d in decorators):
                return True
    return False


def _reads_changed_arguments(nodes: list[ast.AST], callees: set[str], results: set[str]) -> bool:
    """Return True if the tests call a function for its effect on an argument.

    They do if a call is a statement of its own, or if an assert reads an argument and no result of the program. Any
    other test, such as `assert f(x) == sorted(x)`, expects `x` as it was before the call.
    """
    passed = set()  # variables that are arguments
    for node in nodes:
        for call in _calls(node, callees) if isinstance(node, ast.stmt) else ():
            passed.update(*map(_read_names, [*call.args, *(keyword.value for keyword in call.keywords)]))
    for node in nodes:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            arguments = [argument for call in _calls(node.value, callees) for argument in call.args]
            if any(isinstance(argument, ast.Name) for argument in arguments):
                return True
        if isinstance(node, ast.Assert) and not _calls(node.test, callees):
            if _read_names(node.test) & (passed - results) and not _read_names(node.test) & results:
                return True
    return False


def _unsupported_use(nodes: list[ast.AST], callees: set[str]) -> str:
    """Return why the tests need a class of the program in their own process, or ""."""
    for node in nodes:
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
                uses = kinds
            case ast.ExceptHandler(type=ast.expr() as uses) | ast.ClassDef(bases=[uses, *_]):
                pass
            case ast.Attribute(value=ast.Name() as uses):
                pass
            case _:
                continue
        for name in sorted(_read_names(uses) & callees):
            return f"the tests use {name} itself, not only what it returns"
    return ""


def _is_named_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _bound_names(tree: ast.Module) -> set[str]:
    """Return the names that the code binds anywhere, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
    return names
