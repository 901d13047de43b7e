"""The commands in a turn of the model: tool calls in the form of the chat template, or a line of text."""

import ast
import contextlib
import inspect
import json
import re
from collections.abc import Callable

FUNCTION = re.compile(r"<function=(\w+)>(.*?)</function>", re.DOTALL)  # Qwen3.5
PARAMETER = re.compile(r"<parameter=(\w+)>\n?(.*?)\n?</parameter>", re.DOTALL)
TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)  # Qwen, Hermes, SmolLM3
COMMAND = re.compile(r"(\w+)\((.*)\)", re.DOTALL)


def find_commands(answer: str, tools: dict[str, Callable], takes_bare: bool) -> list[tuple[str, dict]]:
    """Return the commands in the answer of a turn, each a tool's name and its arguments; an empty list if there are none.

    They are the tool calls in the form of the chat template, or the last line in the form name(arguments). A tool with
    one text gets it without quotes.

    Args:
        takes_bare: An answer without a command is the argument of the only tool.

    Raises:
        ValueError: A command cannot be read. The message is for the model.
    """
    calls = TOOL_CALL.findall(answer)
    if calls:
        return [_read_call(call) for call in calls]
    calls = FUNCTION.findall(answer)
    if calls:
        return [(name, _read_parameters(text, tools.get(name))) for name, text in calls]
    if answer.strip().startswith('{"name"'):  # Llama 3
        return [_read_call(answer.strip())]
    line = (answer.strip().splitlines() or [""])[-1].strip().strip("`")
    match = COMMAND.fullmatch(line)
    if match and match[1] in tools:
        return [(match[1], _read_arguments(match[0], match[2], tools[match[1]]))]
    if takes_bare and len(tools) == 1:
        (name,) = tools
        if parameter := only_text(tools[name]):
            return [(name, {parameter: line})]
    return []


def only_text(tool: Callable) -> str | None:
    """Return the name of a tool's only parameter if it is a text; otherwise None."""
    parameters = list(inspect.signature(tool).parameters.values())
    return parameters[0].name if len(parameters) == 1 and parameters[0].annotation in (str, "str") else None


def _read_call(text: str) -> tuple[str, dict]:
    try:
        call = json.loads(text)
        arguments = call.get("arguments", call.get("parameters", {}))
        return str(call["name"]), dict(arguments)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError('A tool call has the form {"name": ..., "arguments": {...}}.') from None


def _read_parameters(text: str, tool: Callable | None) -> dict:
    """Return the parameters of a call in tags. Those that are not texts are read as JSON."""
    parameters = inspect.signature(tool).parameters if tool else {}
    values = dict(PARAMETER.findall(text))
    for name, value in values.items():
        if name in parameters and parameters[name].annotation not in (str, "str"):
            with contextlib.suppress(ValueError):
                values[name] = json.loads(value)
    return values


def _read_arguments(command: str, text: str, tool: Callable) -> dict:
    if parameter := only_text(tool):
        text = text.strip().removeprefix(f"{parameter}=")
        return {parameter: text[1:-1] if text[:1] in "'\"" and text[:1] == text[-1:] else text}
    try:
        call = ast.parse(command, mode="eval").body
        values = [ast.literal_eval(argument) for argument in call.args]
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        return dict(inspect.signature(tool).bind(*values, **named).arguments)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"The arguments of {command.partition('(')[0]} cannot be read.") from None
