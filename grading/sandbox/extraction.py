"""Find the program in an answer and complete it."""

import ast
import re
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

from grading.sandbox.cases import parse_python

MAX_PROGRAM_CHARS = 64 * 1024
FENCES = ("```", "~~~")


class Block(NamedTuple):
    language: str
    text: str


def extract_code(answer: str, names: Iterable[str] = ()) -> str:
    """Return the program in an answer: the last fenced block that defines one of `names`, or any function, or the last.

    A fence is at the start of a line, after words, or inside <answer>. The last block need not be closed, and the first
    need not be opened, since the prompt may have opened it. Blocks in languages other than Python count only if there
    are no others. An answer without a fence is returned whole.
    """
    names = tuple(names)
    if "<answer>" in answer:
        parts = [part.partition("</answer>")[0] for part in answer.split("<answer>")[1:]]
        is_fenced = any(fence in answer for fence in FENCES)
        programs = [p for p in parts if any(fence in p for fence in FENCES) or _defines(p, names) or not is_fenced]
        answer = programs[-1] if programs else answer.replace("<answer>", "\n")
    blocks = _blocks(answer.replace("</answer>", "\n"))
    python = [block for block in blocks if block.language.startswith("py")] if not names else []
    candidates = (
        python or [block for block in blocks if block.language.startswith("py") or not block.language] or blocks
    )
    candidates = [block.text for block in candidates]
    matches = [text for text in candidates if _defines(text, names)]
    definitions = [text for text in candidates if "def " in text or "lambda" in text]
    return (matches or definitions or candidates or [answer])[-1].strip("\n").rstrip()


def _defines(text: str, names: tuple[str, ...]) -> bool:
    return any(f"def {name}" in text or f"class {name}" in text or f"{name} =" in text for name in names)


def _blocks(answer: str) -> list[Block]:
    """Return the fenced blocks of an answer."""
    blocks = []
    lines = None  # of the open block
    language = ""
    quotes = 0  # triple quotes in the open block
    if _starts_inside_a_block(answer):
        lines = []

    def close():
        blocks.append(Block(language, textwrap.dedent("\n".join(lines))))  # a fence in a list is indented

    for line in answer.split("\n"):
        before, fence, after = _split_at_fence(line)
        if not fence:
            if lines is not None:
                lines.append(line)
                quotes += line.count('"""') + line.count("'''")
            continue
        if lines is not None:
            in_docstring = quotes % 2 == 1 and before.isspace()
            if in_docstring or (before.strip() and after.strip()):  # a fence within code is text
                lines.append(line)
                continue
            lines.append(before)
            close()
            lines = None
            if not after.strip():
                continue
        language, lines = _first_line(after)
        quotes = 0
        if lines and any(end in lines[0] for end in FENCES):  # opened and closed in one line
            lines = [lines[0].partition(fence)[0]]
            if lines[0].strip():
                close()
            lines = None
    if lines is not None and any(line.strip() for line in lines):
        close()
    return blocks


def _split_at_fence(line: str) -> tuple[str, str, str]:
    """Return the text before the first fence in a line, the fence, and the text after it."""
    starts = [(line.find(fence), fence) for fence in FENCES if fence in line]
    if not starts:
        return line, "", ""
    start, fence = min(starts)
    return line[:start], fence, line[start:].lstrip(fence[0])


def _first_line(text: str) -> tuple[str, list[str]]:
    """Split the text after an opening fence into the language and the lines of code that it begins."""
    word, _, code = text.strip().partition(" ")
    if code or any(fence in word for fence in FENCES):
        is_language = re.fullmatch(r"py(thon)?[\d.]*", word, re.IGNORECASE)
        if is_language and re.match(r"[\w-]+=[\"'{]", code) and not any(fence in code for fence in FENCES):
            return word.lower(), []  # attributes of the block
        return (word.lower(), [code]) if is_language else ("", [text])
    return word.lower(), []


def _starts_inside_a_block(answer: str) -> bool:
    """Return True if the first fence closes a block that the prompt has opened."""
    fences = [line for line in answer.split("\n") if line.lstrip().startswith(FENCES)]
    if len(fences) % 2 == 0 or fences[0].strip().strip("`~"):
        return False
    code = answer[: answer.index(fences[0])]
    if len(code) > MAX_PROGRAM_CHARS:
        return False
    try:
        tree = parse_python(textwrap.dedent(code.strip("\n")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call) for node in tree.body)


def complete_program(code: str, entry_point: str | None, setup: str, starter: str) -> str:
    """Return the whole program: `starter` before an answer that is a bare function body, `setup` before any other."""
    entry_point = re.match(r"\w*", entry_point or "")[0]  # of Solution().add, the class
    defines = rf"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+{entry_point}\b|^{entry_point}[ \t]*="
    if starter and entry_point and not re.search(defines, code, re.MULTILINE):
        first, _, rest = code.partition("\n")
        if not first.startswith((" ", "\t")):  # the first line, or every line, has lost its indentation
            lines = [line for line in rest.split("\n") if line.strip()]
            is_first_only = bool(lines) and all(line.startswith((" ", "\t")) for line in lines)
            code = f"    {first}\n{rest}" if is_first_only else "\n".join("    " + line for line in code.split("\n"))
        return starter.rstrip("\n") + "\n" + code
    return f"{setup}\n{code}" if setup else code
