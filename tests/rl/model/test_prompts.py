"""Prompts: chat templates, system messages, prefills, the room for a completion, and token ids."""

import json

import pytest
from conftest import copy_tiny

from grading import prompt_text
from rl.config import ConfigError
from rl.model.logprobs import completion_logprobs
from rl.model.policy import load_policy


def test_prompts_follow_the_chat_template(policy):
    assert policy.render_prompt("Hi") == "<|user|>Hi<|assistant|>"
    policy.system_prompt = "Be brief."
    assert policy.render_prompt("Hi") == "<|system|>Be brief.<|user|>Hi<|assistant|>"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert policy.render_prompt(turns).endswith("<|user|>a<|assistant|>b<|end|><|user|>c<|assistant|>")


def test_completion_prefix_of_a_template_that_opens_the_thinking(policy):
    from tqdm import tqdm

    from grading import Rewards
    from rl.rollout import Episode, StreamingScorer

    policy.tokenizer.chat_template += "{{- '<think>\\n' if enable_thinking else '' -}}"
    policy.chat_template_kwargs = {"enable_thinking": True}
    assert policy.completion_prefix("Hi") == "<think>\n"
    ids = policy.tokenizer.encode("1+1=2</think>\\boxed{2}<|end|>", add_special_tokens=False)
    row = {"id": 1, "task": "t", "prompt": "Hi"}
    episode = Episode([4], ids, [], False)
    scorer = StreamingScorer(policy, policy.encode([row]), Rewards("rewards.py", []), 1, tqdm(disable=True))
    scorer.add({0: episode})
    completion = episode.completion
    assert completion.text == "<think>\n1+1=2</think>\\boxed{2}" and completion.prompt == "Hi"
    assert (completion.thinking, completion.answer) == ("1+1=2", "\\boxed{2}")
    policy.chat_template_kwargs = {"enable_thinking": False}
    assert policy.completion_prefix("Hi") == ""


def test_system_prompt_replaces_the_system_message_of_a_prompt(policy):
    prompt = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Hi"}]
    assert policy.render_prompt(prompt) == "<|system|>Be long.<|user|>Hi<|assistant|>"
    policy.system_prompt = "Be brief."
    assert policy.render_prompt(prompt) == "<|system|>Be brief.<|user|>Hi<|assistant|>"
    policy.tokenizer.chat_template = None
    assert policy.render_prompt(prompt) == "Be brief.\n\nHi"


@pytest.mark.parametrize("text", ["<think>", "<think>\n", "<think> ", "Let me think.\n<think>\n", "<think>\nOkay, 3"])
def test_continues_a_last_assistant_turn(policy, text):
    """The turn is not closed, and it is the start of the completion that is graded."""
    prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
    policy.tokenizer.chat_template += "{{- '<think>\n' if enable_thinking else '' -}}"
    assert policy.render_prompt(prompt) == "<|user|>Hi<|assistant|>" + text
    assert policy.completion_prefix(prompt) == text
    assert prompt_text(prompt) == "Hi"
    (question,) = policy.encode([{"id": 1, "prompt": prompt}])
    assert question.completion_prefix == text and question.prompt_ids == policy.encode_prompt(prompt)
    policy.chat_template_kwargs = {"enable_thinking": True}  # the template opens the thinking, too
    expected = text if text.startswith("<think>") else "<think>\n" + text
    assert policy.render_prompt(prompt) == "<|user|>Hi<|assistant|>" + expected
    assert policy.completion_prefix(prompt) == expected
    policy.tokenizer.chat_template = None
    assert policy.render_prompt(prompt) == "Hi\n\n" + text and policy.completion_prefix(prompt) == text


def test_continues_a_prompt_without_a_template_that_opens_the_thinking(policy):
    policy.tokenizer.chat_template = None
    assert policy.render_prompt("Hi <think>\n") == "Hi <think>\n"
    assert policy.completion_prefix("Hi <think>\n") == "<think>\n" and policy.completion_prefix("Hi") == ""


def test_prompt_has_a_single_bos(policy):
    """The template writes a BOS token, and the tokenizer would add another one."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = policy.tokenizer
    tokenizer.bos_token = "<|endoftext|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert policy.encode_prompt("Hi").count(bos) == 1
    tokenizer.chat_template = None  # a base model: the plain text with the tokenizer's BOS
    assert policy.encode_prompt("Hi") == [bos, *tokenizer.encode("Hi", add_special_tokens=False)]


def test_eos_ids_are_the_union_of_all_sources(tmp_path, config):
    config.model = copy_tiny(tmp_path / "m", generation_config={"eos_token_id": [0, 2]}, config={"eos_token_id": 3})
    policy = load_policy(config)
    assert policy.eos_ids == {0, 1, 2, 3}
    for eos in policy.eos_ids:
        assert policy.decode([20, 21, eos]) == policy.decode([20, 21])


@pytest.mark.parametrize(
    "opening, closing",
    [
        ("[THINK]", "[/THINK]"),
        ("<seed:think>", "</seed:think>"),
        ("<|channel>thought", "<channel|>"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ],
)
def test_other_marks_of_thinking_become_think_tags(policy, opening, closing):
    text = f"{opening}1+2=3{closing}\\boxed{{3}}"
    ids = policy.tokenizer.encode(text, add_special_tokens=False)
    assert policy.decode(ids) == text  # this model's template does not know the marks
    policy.tokenizer.chat_template += f"{{# {opening} {closing} #}}{{{{- '{opening}\n' if enable_thinking else '' -}}}}"
    assert policy.decode(ids) == "<think>1+2=3</think>\\boxed{3}"
    policy.chat_template_kwargs = {"enable_thinking": True}
    assert policy.completion_prefix("Hi") == "<think>\n"
    assert policy.render_prompt("Hi").endswith(f"{opening}\n")


def test_refuses_a_template_that_leaves_out_the_question(policy):
    policy.tokenizer.chat_template = "{{ messages[0]['role'] }}: "
    with pytest.raises(ConfigError, match="the chat template in .* leaves out the question"):
        policy.encode([{"id": "1", "prompt": "What is 1 + 2?"}])


def test_no_end_of_turn_token_if_the_template_changes_the_answer(policy):
    from rl.model.tokens import find_end_of_turn

    policy.tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] | upper }}\n{% endfor %}"
    assert find_end_of_turn(policy.tokenizer) is None


def test_end_of_turn_token_is_read_from_the_chat_template(policy):
    """The end-of-sequence token of a base model may differ from the one that its template writes after an answer."""
    from rl.model.tokens import find_end_of_turn

    tokenizer = policy.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    assert find_end_of_turn(tokenizer) == im_end and im_end not in policy.eos_ids
    for template in ("{{ messages[1]['content'] }} over", "{{ messages[1]['content'] }}", "{{ raise('no') }}", None):
        tokenizer.chat_template = template
        assert find_end_of_turn(tokenizer) is None


def test_refuses_prompts_that_leave_no_room_for_a_completion(policy):
    rows = [{"id": "long", "prompt": "1" * 600}]
    with pytest.raises(ConfigError, match="^max_completion_length: row long .*626 .*602.*24.*context is 512"):
        policy.encode(rows)


def test_tokens_without_an_embedding_are_one_line_errors(policy):
    policy.tokenizer.add_tokens([f"<extra{i}>" for i in range(40)])
    policy.encode([{"id": "r1", "prompt": "Hi"}])
    with pytest.raises(
        ConfigError, match="^row r2: .* '<extra39>' has the id 14., but the model has only 128 "
    ) as error:
        policy.encode([{"id": "r1", "prompt": "Hi"}, {"id": "r2", "prompt": "Hi <extra39>"}])
    assert "\n" not in str(error.value)
    policy.chat_template_kwargs = {}
    policy.system_prompt = "<extra38>"
    with pytest.raises(ConfigError, match="'<extra38>' has the id 14"):
        policy.encode([{"id": "r1", "prompt": "Hi"}])


def test_padding_and_end_tokens_have_an_embedding(tmp_path, config):
    """A tokenizer may define a padding token, or an end token, that its model lacks."""
    config.model = copy_tiny(tmp_path / "m")
    tokenizer = load_policy(config).tokenizer
    tokenizer.add_tokens([f"<extra{i}>" for i in range(40)])
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<end>")
    tokenizer.save_pretrained(tmp_path / "m")
    policy = load_policy(config)
    assert policy.tokenizer.pad_token_id > 128 and policy.eos_ids == {1} and policy.pad_id == 1
    logprobs, _, _ = completion_logprobs(policy, [[4, 40], [4, 41, 42]], [[20], [20, 21, 22]])
    assert logprobs.isfinite().all()
    config.model = copy_tiny(tmp_path / "pad", config={"pad_token_id": 128})  # refused by transformers
    with pytest.raises(ConfigError, match="^model: .* cannot be loaded: Padding_idx must be within num_embeddings$"):
        load_policy(config)
    config.model = str(tmp_path / "m")
    for file in ("config", "generation_config"):
        path = tmp_path / f"m/{file}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 130}))
    tokenizer.eos_token = "<end>"
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        load_policy(config)


def test_error_names_the_row_whose_prompt_cannot_be_encoded(policy):
    policy.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ConfigError, match="^row r7: .* System role not supported"):
        policy.encode([{"id": "r7", "prompt": "Hi"}])
