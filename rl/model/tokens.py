"""What tokenizer and chat template determine: end tokens, marks of thinking, and ids that the model has no embedding for.

A tokenizer may have more tokens than its model has embeddings: tokens were added without resizing the embedding, or the
tokenizer belongs to another model.
"""

import re

from rl.config import ConfigError

# How chat templates mark the thinking, as patterns, and the tags that graders and page expect.
THINKING_MARKS = {
    r"\[THINK\]": "<think>",  # Magistral, Ministral 3
    r"\[/THINK\]": "</think>",
    r"<seed:think>": "<think>",
    r"</seed:think>": "</think>",
    r"<\|channel>thought": "<think>",  # Gemma 4
    r"<channel\|>": "</think>",
    r"<\|channel\|>analysis<\|message\|>": "<think>",  # gpt-oss
    r"(<\|end\|><\|start\|>assistant)?<\|channel\|>final<\|message\|>": "</think>",
}


def is_embedded(token_id: int | None, model) -> bool:
    """Return whether a token id is set and the model has an embedding for it."""
    return token_id is not None and 0 <= token_id < num_embeddings(model)


def num_embeddings(model) -> int:
    return len(model.get_input_embeddings().weight)


def check_ids(ids: list[int], tokenizer, model) -> None:
    """Raise ValueError if the model has no embedding for a token."""
    limit = num_embeddings(model)
    if unknown := [token_id for token_id in ids if token_id >= limit]:
        raise ValueError(
            f"the token {tokenizer.convert_ids_to_tokens(unknown[0])!r} has the id {unknown[0]}, but the model has only "
            f"{limit} embeddings: use the tokenizer that belongs to the model"
        )


def find_eos_ids(tokenizer, model) -> frozenset[int]:
    """Return the end-of-sequence tokens of tokenizer, model and generation_config, and the end-of-turn token.

    The last one is needed for base models such as Qwen3-4B-Base: none of the three sources lists the <|im_end|> of its
    chat template, so the model would continue after it up to the maximum length.
    """
    ids = {find_end_of_turn(tokenizer)}
    for source in (tokenizer, model.config, model.config.get_text_config(), model.generation_config):
        eos = getattr(source, "eos_token_id", None)
        ids.update(eos if isinstance(eos, (list, tuple)) else [eos])
    ids = {token_id for token_id in ids if is_embedded(token_id, model)}
    if not ids:
        raise ConfigError("the model has no end-of-sequence token: set eos_token in its tokenizer_config.json")
    return frozenset(ids)


def choose_end_id(tokenizer, eos_ids: frozenset[int]) -> int:
    """Return the token that ends a demonstration: the end-of-turn token of the chat template, or the tokenizer's EOS."""
    candidates = (find_end_of_turn(tokenizer), tokenizer.eos_token_id, *sorted(eos_ids))
    return next(token_id for token_id in candidates if token_id in eos_ids)


def find_end_of_turn(tokenizer) -> int | None:
    """Return the special token that the chat template puts directly after an answer, or None."""
    if not tokenizer.chat_template:
        return None
    answer = "xyzzy"
    try:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template may raise anything; encoding the prompts will report it
        return None
    _, rendered, after = text.rpartition(answer)
    if not rendered:  # the template changes the answer
        return None
    ids = tokenizer(after.strip(), add_special_tokens=False).input_ids
    added_tokens = tokenizer.added_tokens_decoder
    return ids[0] if ids and ids[0] in added_tokens and added_tokens[ids[0]].special else None


def unify_thinking(text: str, chat_template: str | None) -> str:
    """Replace the marks of thinking that a chat template contains by <think> and </think>."""
    for pattern, tag in THINKING_MARKS.items():
        if re.search(pattern, chat_template or ""):
            text = re.sub(pattern, tag, text)
    return text


def find_opening(text: str) -> re.Match | None:
    """Return the match of an opening mark of thinking at the end of a prompt, with the whitespace after it, or None."""
    openings = "|".join(["<think>", *(pattern for pattern, tag in THINKING_MARKS.items() if tag == "<think>")])
    return re.search(rf"({openings})\s*\Z", text)
