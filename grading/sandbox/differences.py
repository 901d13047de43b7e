"""Where Monty differs from CPython. Monty's verdict on code that uses such a feature is not trusted.

Monty ignores annotations, treats generator expressions and the results of map() and the like as lists, keeps the order
of sets, uses the syntax of Rust's regular expressions, and lacks features whose absence a program can catch.
"""

import ast
import builtins
import functools
import re
import typing

from grading.sandbox.cases import parse_python

_ITERATORS = {"map", "zip", "filter", "enumerate", "reversed"}
_SETS = {"set", "frozenset"}
# Functions that read an iterator to its end, and functions for which the order of a set does not matter.
_READERS = {"list", "tuple", "set", "frozenset", "dict", "sum", "max", "min", "sorted", "any", "all", "join", "extend"}
_IGNORE_ORDER = {"len", "sorted", "sum", "min", "max", "any", "all", "bool", "set", "frozenset"}
_SET_OPERATORS = (ast.BitAnd, ast.BitOr, ast.BitXor, ast.Sub)
# Handlers of these exceptions also catch the absence of a feature in Monty.
_BROAD = {
    "BaseException", "Exception", "ImportError", "ModuleNotFoundError", "AttributeError", "NameError", "TypeError",
    "RuntimeError", "NotImplementedError", "RecursionError", "MemoryError", "TimeoutError", "OSError",
}  # fmt: skip
_INCOMPLETE = {"open", "bytes", "bytearray", "memoryview", "super"}


@functools.lru_cache(maxsize=4096)
def difference(code: str, may_hold_newlines: bool = True) -> str:
    """Return why Monty's verdict on `code` may differ from CPython's, or "" if it does not.

    Args:
        code: A program, or the code of a test.
        may_hold_newlines: False if no text that the program gets holds a newline, before which `$` matches in CPython.
    """
    try:
        return _difference(parse_python(code), may_hold_newlines or "\\n" in code)
    except RecursionError:
        return "it is nested too deeply"
    except (SyntaxError, ValueError, MemoryError):
        return "CPython cannot parse it"


def _difference(tree: ast.Module, may_hold_newlines: bool) -> str:
    nodes = list(ast.walk(tree))
    if _treats_as_list(nodes):
        return "an iterator or a set may have been treated as a list"
    if not _annotations_are_known(tree, nodes):
        return "an annotation may not be defined"
    if not _patterns_are_common(nodes, may_hold_newlines):
        return "a regular expression may have another meaning"
    for node in nodes:
        match node:
            case ast.ExceptHandler(type=kind) if kind is None or _names(kind) & _BROAD:
                return "an exception handler may hide what Monty lacks"
            case ast.FunctionDef(name=name) | ast.Attribute(attr=name) if _is_special(name):
                return f"Monty may not support {name}"
            case ast.Call(func=ast.Name(id="pow"), args=[_, _, _]):
                return "Monty may not support pow() with a modulus"
            case ast.Call(func=ast.Attribute(attr="encode" | "decode"), args=[_, *_]):
                return "Monty may not support the encoding"
            case ast.AugAssign(op=ast.Add(), value=ast.Tuple()):
                return "Monty cannot add a tuple to a list"
            case ast.Await() | ast.AsyncFor() | ast.comprehension(is_async=1):
                return "Monty may accept an await that CPython refuses"
            case ast.Module() if any(isinstance(n, ast.Return) for n in _outside_functions(node)):
                return "Monty may accept a return outside of a function"
            case ast.ClassDef() if any(isinstance(n, ast.comprehension) for n in _outside_functions(node)):
                return "Monty may give a comprehension other variables"
            case ast.Name(id=name) if name in _INCOMPLETE:
                return f"Monty supports {name} only in part"
    return ""


def _outside_functions(tree: ast.Module | ast.ClassDef):
    """Yield the nodes of a module or class that are not inside a function."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from _outside_functions(node)


def _is_special(name: str) -> bool:
    return name.startswith("__") and name != "__init__"  # special, or private to a class


def _names(node: ast.AST) -> set[str]:
    return {
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute))
    }


# --- iterators and sets


def _treats_as_list(nodes: list[ast.AST]) -> bool:
    """Return True unless every iterator and set is consumed at once by code that does not depend on its type."""
    read = set()  # ids of nodes whose iterator is read to its end
    unordered = set()  # ids of nodes where a set's order does not matter
    for node in nodes:
        if isinstance(node, (ast.For, ast.comprehension)):
            read.add(id(node.iter))
        elif isinstance(node, ast.Starred):
            read.add(id(node.value))
        elif isinstance(node, ast.Assign) and all(isinstance(t, (ast.Tuple, ast.List)) for t in node.targets):
            read.add(id(node.value))
        elif isinstance(node, ast.Compare):
            unordered.update(map(id, [node.left, *node.comparators]))
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            read.update(map(id, node.args if name in _READERS else ()))
            unordered.update(map(id, node.args if name in _IGNORE_ORDER else ()))
            read.add(id(node.func))
    for node in nodes:
        callee = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        if (callee in _ITERATORS or isinstance(node, ast.GeneratorExp)) and id(node) not in read:
            return True
        if (callee in _SETS or isinstance(node, (ast.Set, ast.SetComp))) and id(node) not in unordered:
            return True
        if isinstance(node, ast.Name) and node.id in _ITERATORS | _SETS and id(node) not in read:
            return True  # perhaps called under another name
        if isinstance(node, ast.BinOp) and isinstance(node.op, _SET_OPERATORS) and id(node) not in unordered:
            if any(map(_is_view, (node.left, node.right))):
                return True
    return False


def _is_view(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("keys", "items")


# --- annotations


# Number of parameters of a generic type of typing, or None if it takes any number.
_PARAMETERS = {
    "Tuple": None, "Union": None, "List": 1, "Set": 1, "FrozenSet": 1, "Deque": 1, "Optional": 1, "Iterable": 1,
    "Iterator": 1, "Sequence": 1, "Collection": 1, "MutableSequence": 1, "Type": 1, "Counter": 1, "Dict": 2,
    "Mapping": 2, "MutableMapping": 2, "DefaultDict": 2, "OrderedDict": 2,
}  # fmt: skip
_BUILTIN_GENERICS = {"list", "dict", "tuple", "set", "frozenset", "type"}


def _annotations_are_known(tree: ast.Module, nodes: list[ast.AST]) -> bool:
    """Return True if every annotation that CPython evaluates is known to be valid there."""
    defined = {}  # name -> the line after which it is defined
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            if node.module == "__future__" and any(alias.name == "annotations" for alias in node.names):
                return True
            for alias in node.names:
                defined[alias.asname or alias.name] = node.lineno
        elif isinstance(node, ast.ClassDef):
            defined[node.name] = node.end_lineno
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "typing":
            if not all(alias.asname is None and hasattr(typing, alias.name) for alias in node.names):
                return False
    return all(_is_known_type(annotation, defined) for annotation in _evaluated_annotations(tree))


def _evaluated_annotations(tree: ast.AST, in_function: bool = False):
    for node in ast.iter_child_nodes(tree):
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if is_function and node.returns:
            yield node.returns
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation:
            if isinstance(node, ast.arg) or not in_function:
                yield node.annotation
        yield from _evaluated_annotations(node, (in_function or is_function) and not isinstance(node, ast.ClassDef))


def _is_known_type(node: ast.AST, defined: dict[str, int], nested: bool = False) -> bool:
    def is_known(part):
        return _is_known_type(part, defined, nested=True)

    match node:
        case ast.Constant(value=None):
            return True
        case ast.Constant(value=str(text)):
            return text.isidentifier() or not nested
        case ast.Name(id=name):
            return hasattr(builtins, name) or defined.get(name, node.lineno) < node.lineno
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            is_type = not any(isinstance(part, ast.Constant) and part.value is not None for part in (left, right))
            return is_type and not isinstance(left, ast.Constant) and is_known(left) and is_known(right)
        case ast.Subscript(value=ast.Name(id=name), slice=parameters):
            parts = parameters.elts if isinstance(parameters, ast.Tuple) else [parameters]
            if name == "Callable" and is_known(node.value) and len(parts) == 2:
                parts = [*(parts[0].elts if isinstance(parts[0], ast.List) else [parts[0]]), parts[1]]
            elif name not in _BUILTIN_GENERICS:
                if name not in _PARAMETERS or _PARAMETERS[name] not in (None, len(parts)) or not is_known(node.value):
                    return False
            return all(isinstance(part, ast.Constant) and part.value is ... or is_known(part) for part in parts)
    return False


# --- regular expressions


_ESCAPE = r"\\[dDwWsS.*+?^$|()\[\]{}/\\nrt\"'-]"
_CLASS = rf"\[\^?(?:{_ESCAPE}|[^\\\[\]&~|-])(?:{_ESCAPE}|[^\\\[\]&~|-]|-(?=[^\[\]&~|-]))*-?\]"
_QUANTIFIER = r"(?:[*+?]|\{\d{1,4}(?:,\d{0,4})?\})\??(?![*+?{])"
# The syntax of regular expressions that has the same meaning in Python and in Rust.
_COMMON_PATTERN = re.compile(
    rf"(?:(?:{_ESCAPE}|{_CLASS}|[^\\\[\](){{}}|^$*+?]|\))(?:{_QUANTIFIER})?|\\[bB]|\((?:\?[:=!])?(?![*+?{{])"
    r"|[|^$](?![*+?{]))*"
)
_MAX_PATTERN = 120  # characters; compiling a longer one may take long
_READS_ALL = {"findall", "finditer", "sub", "split", "compile"}  # differ in empty matches
_READS_ONE = {"match", "search", "fullmatch"}


def _patterns_are_common(nodes: list[ast.AST], may_hold_newlines: bool) -> bool:
    """Return True if every regular expression is a text that has the same meaning in Python and in Rust."""
    if not any(isinstance(n, (ast.Import, ast.ImportFrom)) and "re" in _imported(n) for n in nodes):
        return True
    texts = {}  # variable -> the text that it holds, or None
    for node in nodes:
        if isinstance(node, ast.arg) or (isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)):
            name = node.arg if isinstance(node, ast.arg) else node.id
            texts[name] = None if name in texts else ""
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))) if (
                texts[name] is not None
            ):
                texts[name] = text
    uses = 0
    for node in nodes:
        match node:
            case ast.ImportFrom(module="re") | ast.Import(names=[ast.alias(name="re", asname=str()), *_]):
                return False
            case ast.Call(func=ast.Attribute(value=ast.Name(id="re"), attr=name), args=[pattern, *_], keywords=[]):
                text = pattern.value if isinstance(pattern, ast.Constant) else texts.get(getattr(pattern, "id", None))
                most = {"split": 2, "sub": 3, "compile": 1}.get(name, 2)
                if (
                    name not in _READS_ALL | _READS_ONE
                    or len(node.args) > most
                    or not isinstance(text, str)
                    or not text
                ):
                    return False
                if not _is_common(text, name in _READS_ALL, may_hold_newlines):
                    return False
                uses += 1
            case ast.Name(id="re"):
                uses -= 1
    return uses == 0


def _imported(node: ast.Import | ast.ImportFrom) -> set[str]:
    return {node.module} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}


@functools.lru_cache(maxsize=4096)
def _is_common(pattern: str, reads_all: bool, may_hold_newlines: bool) -> bool:
    if len(pattern) > _MAX_PATTERN or not _COMMON_PATTERN.fullmatch(pattern):
        return False
    if "$" in pattern and (may_hold_newlines or reads_all):
        return False
    try:
        return not (reads_all and re.compile(pattern).search(""))
    except (re.error, RecursionError, OverflowError, MemoryError):
        return False
