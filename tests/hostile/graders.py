"""Attacks on graders that read formulas: answers that would run as Python if a grader evaluated them.

An attack is an expression that succeeds only if it can read, write or reach something. It is put into answers that are
right, or that a grader takes for right, if the expression is evaluated and succeeds. Each of them must score 0.
"""

from dataclasses import dataclass

INTEGRAND = {"variable": "x", "integrand": "2*x*exp(x**2) + 3"}
ROWS = {  # a row and a right answer for each grader
    "math": ({"answer": "7"}, "7"),
    "countdown": ({"grader": "countdown", "target": 7, "nums": [3, 4]}, "3+4"),
    "simple_integration": ({"metadata": {"variable": "x", "integrand": "3*x**2"}}, "x**3"),
    "intermediate_integration": ({"metadata": INTEGRAND}, "exp(x**2) + 3*x"),
    "polynomial_multiplication": ({"answer": "x**2 - 1"}, "x**2 - 1"),
    "gym countdown": ({"metadata": {"target": 7, "numbers": [3, 4]}}, "3+4"),
    "puzzle24": ({"metadata": {"numbers": [4, 6, 7, 7]}}, "4*6+7-7"),
    "binary_matrix": ({"answer": "0 1\n1 2", "metadata": {}}, "0 1\n1 2"),
    "spiral_matrix": ({"answer": "1 2 3", "metadata": {}}, "1 2 3"),
    "string_insertion": ({"answer": "ABC", "metadata": {}}, "ABC"),
    "n_queens": ({"metadata": {"valid_answers": ["Q _\n_ Q"]}}, "Q _\n_ Q"),
    "gsm_symbolic": ({"answer": "7"}, "7"),
    "complex_arithmetic": ({"metadata": {"result": [7.0, 0.0]}}, "7"),
    "coin_flip": ({"answer": "0.25"}, "1/4"),
    "number_sorting": ({"answer": "['1', '2']", "metadata": {"sorted_numbers": ["1", "2"]}}, "['1', '2']"),
    "game_of_life": ({"answer": "[[0, 1]]", "metadata": {}}, "[[0, 1]]"),
}
LISTS = {  # the right answer as a Python value, which `score_answer` of these families evaluates
    "binary_matrix": "[[0, 1], [1, 2]]",
    "spiral_matrix": "[1, 2, 3]",
    "string_insertion": "['A', 'B', 'C']",
    "n_queens": "[['Q', '_'], ['_', 'Q']]",
}
REACHING = {  # expressions that succeed only outside of a sandbox
    "a file of the user": "open('@HOME@/secret.txt').read()",
    "a file, through pathlib": "__import__('pathlib').Path('@HOME@/secret.txt').read_text()",
    "a file, through io in a subclass": "[k for k in ().__class__.__base__.__subclasses__() if k.__name__ == '_IOBase'] and "
    "__import__('io').open('@HOME@/secret.txt').read()",
    "the folder of the user": "__import__('os').listdir('@HOME@')",
    "the project": "open('@PROJECT@/README.md').read()",
    "the environment": "__import__('os').environ['PONDER_CANARY']",
    "the environment of the trainer": "open('/proc/@PID@/environ', 'rb').read()",
    "the password file": "open('/etc/passwd').read()",
    "writing a file": "open('@HOME@/@MARK@', 'w').write('x')",
    "a command": "__import__('os').system('touch @HOME@/@MARK@') == 0",
    "a process": "__import__('subprocess').run(['/bin/true']).returncode == 0",
    "the network": "__import__('socket').create_connection(('127.0.0.1', @TCP@))",
    "a signal to the trainer": "__import__('os').kill(@PID@, 0) is None",
    "sympy's preview": "__import__('sympy').preview('x', viewer='file', filename='@HOME@/@MARK@') is None",
}
EVALUATED = {  # expressions that succeed in any process that evaluates them
    "the gold in a caller's variables": "[f for f in [__import__('sys')._getframe(n) for n in range(1, 4)] "
    "if f.f_locals.get('entry') or f.f_locals.get('oracle_answer')]",
    "the gold among all objects": "__import__('gc').get_objects()",
    "builtins": "__builtins__",
    "an import": "__import__('os')",
    "subclasses": "().__class__.__base__.__subclasses__()",
    "an attribute": "x.__class__",
    "a method": "(1).bit_length()",
    "exec": "exec('1') is None",
    "eval": "eval('1')",
    "compile": "compile('1', '', 'eval')",
    "a lambda": "(lambda: 1)()",
    "a comprehension": "[1 for _ in (1,)]",
    "a walrus": "(y := 1)",
    "a format string": "f'{1}'",
    "a subscript": "(1,)[0]",
    "a keyword": "dict(a=1)",
    "sympify": "sympify('1')",
    "S": "S('1')",
    "parse_expr": "parse_expr('1')",
    "lambdify": "lambdify(Symbol('y'), 1)",
    "Function": "Function('f')",
    "Symbol": "Symbol('y')",
    "var": "var('y')",
    "print": "print('1') is None",
    "globals": "globals()",
    "a condition": "1 if 1 else 0",
    "or": "0 or 1",
    "a comparison": "1 == 1",
}
HEAVY = {  # answers that are expensive to evaluate
    "a tower of powers": "9**9**9**9",
    "a tower of powers of the variable": "x**x**x**x**x",
    "a factorial": "factorial(99999999)",
    "factorials in sympy's notation": "9!!!!!!!!",
    "a large exponent": "x**999999999999999",
    "an expansion": "expand((x+1)**9999)",
    "a sum": "Sum(x, (x, 1, 10**10)).doit()",
    "brackets": "(" * 3000 + "x" + ")" * 3000,
    "minus signs": "-" * 3000 + "x",
    "lists": "[" * 5000 + "]" * 5000,
    "digits": "9" * 9000,
    "many terms": "+".join(["x"] * 3000),
    "functions in functions": "sin(" * 100 + "x" + ")" * 100,
    "null bytes": "x\x00**3",
    "a lone surrogate": "\ud800",
    "other digits": "x**３",
    "other letters": "𝐱**3",
    "a comment": "x**3 # C",
    "a line after the formula": "x**3\nimport os",
    "two statements": "x**3; import os",
    "an assignment": "x = x**3",
}


@dataclass(frozen=True, eq=False)
class GraderCase:
    """An answer with the grader that must give it 0. Placeholders such as @HOME@ are replaced (`host.Host`)."""

    grader: str  # a key of ROWS
    name: str
    answer: str

    def __str__(self):
        return f"{self.grader}: {self.name}"


def right_if(attack: str, grader: str) -> list[str]:
    """Return answers that are right if `attack` is evaluated and succeeds."""
    gold = LISTS.get(grader) or ROWS[grader][1]
    return [f"({gold}) if ({attack}) else 0", f"{gold} + 0*len([{attack}])", f"[{gold}, {attack}][0]"]


def row_of(grader: str) -> dict:
    """Return a data row for a grader, as data/gym.py and data/tasks.py make them."""
    content = ROWS[grader][0]
    if grader in ("math", "countdown"):
        return {"id": grader, "prompt": "", "task": grader, **content}
    family = grader.removeprefix("gym ")
    return {"id": grader, "prompt": "", "task": family, "grader": "reasoning_gym", "family": family, "entry": content}


CASES = [
    GraderCase(grader, f"{name} ({number})", answer)
    for grader in ROWS
    for name, attack in (REACHING | EVALUATED).items()
    for number, answer in enumerate(right_if(attack, grader), 1)
] + [GraderCase(grader, name, answer) for grader in ROWS for name, answer in HEAVY.items()]
