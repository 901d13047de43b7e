"""Prompts and replies of environments, in the form of the chat template."""

import functools
import inspect

from transformers.utils import get_json_schema

from data.environments import add_observation, find_class, make_environment, tools_of
from grading.base import first_line
from rl.config import ConfigError
from rl.model.tokens import find_opening

HOW_TO_ACT = "\n\nTo act, end your answer with one line of these forms. You then get the result.\n"
DUMMY = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}]


def render_replies(policy, replies: list[dict]) -> tuple[str, str]:
    """Return what the chat template writes after a turn: these messages and the generation prompt.

    It is the difference of two renderings of a short conversation, without and with the messages, after the end-of-turn
    token. Also returns the start of the next turn that the template writes, such as "<think>".

    Raises:
        ConfigError: The template has no end-of-turn token, or does not keep the beginning of a conversation.
    """
    tokenizer = policy.tokenizer

    def render(messages: list[dict], **options) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options, **policy.chat_template_kwargs)

    before = render(DUMMY)
    after = render(DUMMY + replies, add_generation_prompt=True)
    ends = (before.rfind(token) + len(token) for token in map(tokenizer.decode, policy.eos_ids) if token in before)
    kept = before[: max(ends, default=0)]
    if DUMMY[1]["content"] not in kept or not after.startswith(kept):
        raise ConfigError(
            f"environment: the chat template of {tokenizer.name_or_path} cannot be used for several turns: it "
            + ("changes a conversation when a turn is added" if kept else "does not end an answer with an end token")
        )
    text = after[len(kept) :]
    opening = find_opening(text)
    return text, opening[0] if opening else ""


def plays_with_tools(policy) -> bool:
    """Return whether the chat template has tools; otherwise commands and replies are plain text."""
    if policy.play == "auto":
        return "tools" in (policy.tokenizer.chat_template or "")
    return policy.play == "tools"


def with_commands(policy, prompt: str | list[dict], observation: str, environment: str) -> str | list[dict]:
    """Return a prompt with the forms of the commands, for plain-text play of a class that writes nothing into prompts."""
    if plays_with_tools(policy) or observation or getattr(find_class(environment), "prompt", None):
        return prompt
    tools = tools_of(make_environment(environment))
    forms = [
        f"{name}({', '.join(inspect.signature(tool).parameters)}): {summary(tool)}" for name, tool in tools.items()
    ]
    return add_observation(prompt, HOW_TO_ACT + "\n".join(forms))


def prompt_and_tools(policy, row: dict) -> tuple[str | list[dict], list[dict] | None]:
    """Return the prompt of a row with an environment, and the schemas of its tools for the chat template."""
    prompt = add_observation(row["prompt"], row["observation"])
    name = row["environment"]
    return with_commands(policy, prompt, row["observation"], name), tool_schemas(name) if plays_with_tools(
        policy
    ) else None


def summary(tool) -> str:
    return (inspect.getdoc(tool) or "").partition("\n")[0]


@functools.cache  # called for each row
def tool_schemas(environment: str) -> list[dict]:
    """Return the JSON schemas of a class's tools. Raises ConfigError if a docstring or a type hint is missing."""
    schemas = []
    for name, tool in tools_of(make_environment(environment)).items():
        try:
            schemas.append(get_json_schema(tool))
        except Exception as error:
            raise ConfigError(f"environment: {environment}.{name}: {first_line(error)}") from error
    return schemas
