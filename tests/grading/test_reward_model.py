"""Reward models as reward functions: values compared with transformers row by row, errors, and verdicts."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import completion, score_one, write
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from grading import RewardError, load_rewards, preflight, reward_model, score_all
from grading.rewards import models
from grading.rewards.models import RewardModel, _load

PROMPTS = ["2+5=?", "What is 3 + 4 + 5?", "1", "Compute 9 - 2 + 1.", "A bus has 3 riders."]
TEXTS = ["7", "<think>3+4=7\n7+5=12</think>\\boxed{12}", "", "8" * 40, "\\boxed{3}"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def save(folder, kind="qwen", labels=1, chat=True, context=128, padding_side="right", pad=0, **settings):
    """Save a small random classifier with the tiny model's tokenizer. Return its folder."""
    tokenizer = AutoTokenizer.from_pretrained("data/tiny", padding_side=padding_side)
    if not chat:
        tokenizer.chat_template = None
    tokenizer.model_max_length = 10**9
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": 128, "num_labels": labels, "pad_token_id": pad, "initializer_range": 0.5}
    if kind == "bert":
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = BertConfig(**sizes, **shape, max_position_embeddings=context, **settings)
        model = BertForSequenceClassification(config)
    elif kind == "gpt2":
        config = GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=2, n_positions=context, **settings)
        model = GPT2ForSequenceClassification(config)
    else:
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        shape |= {"head_dim": 8, "intermediate_size": 32, "max_position_embeddings": context}
        model = Qwen3ForSequenceClassification(Qwen3Config(**sizes, **shape, **settings))
    model.save_pretrained(folder)
    return str(folder)


def plain_logits(folder, prompts, texts):
    """Return the logits (N, labels) of one forward pass per row, without Ponder's code."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for prompt, text in zip(prompts, texts):
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            chat = [*chat, {"role": "assistant", "content": text}]
            inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        else:
            inputs = tokenizer(prompt, text, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            rows.append(model(**inputs).logits[0])
    return torch.stack(rows)


def values(function, prompts=PROMPTS, texts=TEXTS):
    return torch.tensor([value for value, _ in function(prompts, texts)])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind, chat", [("qwen", True), ("bert", True), ("gpt2", True), ("qwen", False)])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batch_equals_single_rows(tmp_path, kind, chat, side, batch_size, monkeypatch):
    monkeypatch.setattr(models, "BATCH_SIZE", batch_size)
    folder = save(tmp_path / "m", kind, chat=chat, padding_side=side)
    actual = values(reward_model(folder))
    expected = plain_logits(folder, PROMPTS, TEXTS)[:, 0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert actual.std() > 1e-3  # the rows differ
    if kind == "qwen":
        squashed = values(reward_model(folder, sigmoid=True))
        torch.testing.assert_close(squashed, expected.sigmoid(), atol=1e-5, rtol=0)


def test_text_pairs_with_special_tokens_and_types(tmp_path):
    """BERT's format: [CLS] prompt [SEP] completion [SEP], with token types 0 and 1, also if it has to be truncated."""
    from tokenizers.processors import TemplateProcessing

    folder = save(tmp_path / "m", "bert", chat=False, context=32)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(folder, model_input_names=names)
    eos = ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A <|end|>", pair="<|end|>:0 $A:0 <|end|>:0 $B:1 <|end|>:1", special_tokens=[eos]
    )
    tokenizer.save_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    function = reward_model(folder)
    #           fits,      prompt truncated            no prompt left, completion truncated
    prompts = ["12+13=?", "1234567890" * 3 + "2+2=?", "1+1=?"]
    texts = ["25", "it is 4", "abcdefghij" * 5]
    inputs = [("12+13=?", "25"), (prompts[1][-22:], "it is 4"), ("", texts[2][-29:])]
    end = tokenizer.eos_token_id
    for (prompt, text), (value, reason) in zip(inputs, function(prompts, texts)):
        a, b = (tokenizer.encode(part, add_special_tokens=False) for part in (prompt, text))
        ids = torch.tensor([[end, *a, end, *b, end]])
        types = torch.tensor([[0] * (len(a) + 2) + [1] * (len(b) + 1)])
        assert ids.shape[1] <= 32
        with torch.no_grad():
            expected = model(input_ids=ids, token_type_ids=types, attention_mask=torch.ones_like(ids)).logits[0, 0]
            untyped = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
        assert abs(value - expected) < 1e-5
        assert abs(expected - untyped) > 1e-4
        assert bool(reason) == (ids.shape[1] == 32)


def test_long_chats_are_truncated_from_the_left(tmp_path):
    folder = save(tmp_path / "m", context=24)
    prompts, texts = ["x" * 50, "2+2=?"], ["4", "1234567890" * 4]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for i, (value, reason) in enumerate(reward_model(folder)(prompts, texts)):
        chat = [{"role": "user", "content": prompts[i]}, {"role": "assistant", "content": texts[i]}]
        ids = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert abs(value - model(input_ids=ids[:, -24:]).logits[0, 0].item()) < 1e-5
        assert f" {ids.shape[1] - 24} of {ids.shape[1]} tokens" in reason


@pytest.mark.parametrize("kind", ["qwen", "gpt2"])
def test_model_without_a_padding_token(tmp_path, kind):
    """Transformers cannot batch without one. The score is read at the last token, whichever it is, also ids 0 and 1."""
    folder = save(tmp_path / "m", kind, chat=False, pad=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["a", "a", "a<|end|>", "abc<|endoftext|>", "abc<unk>", "aaaaaa"]
    ends = [tokenizer.encode(text)[-1] for text in texts]
    assert {0, 1} <= set(ends)
    prompts = ["2+2=?", "a longer prompt"] + ["q"] * 4
    actual = values(reward_model(folder), prompts, texts)
    torch.testing.assert_close(actual, plain_logits(folder, prompts, texts)[:, 0], atol=1e-5, rtol=1e-5)
    assert _load(folder)[1].config.pad_token_id is None


def test_prompts_may_be_conversations(tmp_path):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2+2=?"}]
    folder = save(tmp_path / "m")
    actual = values(reward_model(folder), [chat, "2+2=?"], ["4", "4"])
    torch.testing.assert_close(actual, plain_logits(folder, [chat, "2+2=?"], ["4", "4"])[:, 0], atol=1e-5, rtol=1e-5)
    no_template = save(tmp_path / "bare", chat=False)
    joined = plain_logits(no_template, ["Be kind.\n\n2+2=?"], ["4"])[:, 0]
    torch.testing.assert_close(values(reward_model(no_template), [chat], ["4"]), joined, atol=1e-5, rtol=1e-5)


def test_answer_only(tmp_path):
    function = reward_model(save(tmp_path / "m"), answer_only=True)
    texts = ["<think>hm</think> 4", "4", "<think>4", ""]
    closed, answer, unclosed, empty = values(function, ["q"] * 4, texts)
    assert closed == answer and unclosed == empty != closed


def test_empty_texts_have_a_value(tmp_path):
    function = reward_model(save(tmp_path / "m", chat=False))
    assert values(function, ["", ""], ["", "a"]).isfinite().all()
    assert values(function, [""], [""]).isfinite().all()


@pytest.mark.parametrize(
    "problem_type", [None, "single_label_classification", "multi_label_classification", "regression"]
)
def test_labels(tmp_path, problem_type):
    labels = {0: "bad", 1: "fair", 2: "good"}
    numbers = {name: number for number, name in labels.items()}
    folder = save(tmp_path / "m", labels=3, id2label=labels, label2id=numbers, problem_type=problem_type)
    logits = plain_logits(folder, PROMPTS, TEXTS)
    expected = {"multi_label_classification": logits.sigmoid(), "regression": logits}.get(
        problem_type, logits.softmax(-1)
    )
    for label in ("good", 2):
        actual = values(reward_model(folder, label=label))
        torch.testing.assert_close(actual, expected[:, 2], atol=1e-5, rtol=1e-5)
    assert reward_model(folder, label="good").is_unbounded == (problem_type == "regression")


def test_refuses_missing_and_unknown_labels(tmp_path):
    folder = save(tmp_path / "m", labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    single = save(tmp_path / "single")

    def message(model, **settings):
        with pytest.raises(RewardError) as error:
            reward_model(model, **settings)(["q"], ["a"])
        assert "\n" not in str(error.value)
        return str(error.value)

    assert f"label is None, but must name a label of {folder}" in message(folder)
    assert message(folder).endswith("'bad', 'good'.")
    assert message(folder, label="god").endswith("'bad', 'good'. Did you mean 'good'?")
    assert "label is 2, but must name" in message(folder, label=2)
    assert "if there is only one" in message(single, label="good")
    probability, squashed = (values(reward_model(folder, label=1, sigmoid=sigmoid)) for sigmoid in (False, True))
    assert probability.equal(squashed)  # probabilities are already within 0..1


def test_refuses_models_that_cannot_be_used(tmp_path):
    for name in ("./nowhere", "a/b/c", str(tmp_path)):
        with pytest.raises(RewardError, match=f"^reward_model: {name} cannot be loaded as a sequence classifier: ."):
            reward_model(name)(["q"], ["a"])
    untrained = reward_model("data/tiny")  # a language model, loaded with a random classification head
    with pytest.raises(RewardError, match="data/tiny has no trained classification head.*score.weight"):
        untrained(["q"], ["a"])
    with pytest.raises(
        RewardError, match="^reward_model: no-such-org/no-model cannot be loaded as a sequence classifier: ."
    ):
        reward_model("no-such-org/no-model")(["q"], ["a"])
    folder = tmp_path / "broken"
    save(folder)
    (folder / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(RewardError, match="broken cannot be loaded as a sequence classifier"):
        reward_model(str(folder))(["q"], ["a"])
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(RewardError, match="broken cannot be loaded as a sequence classifier"):
        reward_model(str(folder))(["q"], ["a"])


# --- in a reward file

RULE = """
@reward
def correct(c): return grade_math(c.answer, c.row["answer"])
"""


def test_reward_model_with_a_rule_in_a_reward_file(tmp_path):
    folder = save(tmp_path / "kind-model_v0.1")
    rewards = load_rewards(write(tmp_path, RULE + f'helpful = reward_model("{folder}", weight=0.2, sigmoid=True)\n'))
    assert rewards.names == ["correct", "kind_model_v0_1"]
    assert load_rewards(str(rewards.path), None, {"kind_model_v0_1": 0.5}).functions[1].weight == 0.5
    completions = [completion(text, prompt=prompt, answer="3") for prompt, text in zip(PROMPTS, TEXTS)]
    expected = plain_logits(folder, PROMPTS, TEXTS)[:, 0].sigmoid().tolist()
    scores = score_all(rewards, completions)
    for score, value, text in zip(scores, expected, TEXTS):
        assert score.parts["kind_model_v0_1"] == pytest.approx(value, abs=1e-5)
        assert score.total == pytest.approx(("{3}" in text) + 0.2 * value, abs=1e-5)
        assert (score.judge, score.is_right) == ("correct", "{3}" in text)
    row = {"id": "r", "task": "t", "prompt": "3+4=?", "answer": "7"}
    assert preflight(rewards, [row]) == []
    conversation = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "2?"},
    ]
    (score,) = score_all(rewards, [completion("2", prompt=conversation, answer="2")])
    single = plain_logits(folder, [conversation], ["2"])[0, 0].sigmoid().item()
    assert score.parts["kind_model_v0_1"] == pytest.approx(single, abs=1e-5)  # the model reads the whole conversation


def test_self_test_with_a_reward_model(tmp_path, capsys):
    from tools.self_test import self_test

    folder = save(tmp_path / "m", context=256)
    source = RULE + f'helpful = reward_model("{folder}", name="helpful", weight=0.2, sigmoid=True)\n'
    self_test(write(tmp_path, source), ["--data", "sums", "-n", "1"])
    printed = capsys.readouterr().out
    assert "self-test passed; 2 rewards" in printed and "helpful 0.2" in printed
    assert "very long" in printed  # exceeds the model's context


def test_a_reward_model_never_judges(tmp_path):
    folder = save(tmp_path / "m")

    def score_constant_model(source, weight, **settings):
        line = f'm = reward_model("{folder}", name="m", weight={weight}, **{settings})\n'
        rewards = load_rewards(write(tmp_path, source + line))
        rewards.functions[-1].function.__class__ = Always
        row = {"id": "r", "task": "t", "prompt": "3+4=?", "answer": "7"}
        (score,) = score_all(rewards, [completion("8", **row)])
        return score.judge, score.verdict, rewards, row

    class Always(RewardModel):
        def __call__(self, prompts, completions):
            return [5.0] * len(prompts)

    rule = "@reward(weight=0.5)\ndef right(c): return c.text == '7'\n"  # does not use the row
    judge, verdict, rewards, row = score_constant_model(rule, 10)
    assert (judge, verdict) == ("right", "wrong")
    notes = preflight(rewards, [row])
    assert notes[0].startswith("warning: on math rows m is the raw score of a reward model")

    judge, verdict, rewards, row = score_constant_model("", 1, sigmoid=True)
    assert (judge, verdict) == (None, "wrong")
    notes = preflight(rewards, [row])
    assert len(notes) == 1 and "the reward model m gives no verdict" in notes[0]

    math_rule = "@reward(when='math')\ndef right(c): return c.answer == c.row['answer']\n"
    *_, rewards, row = score_constant_model(math_rule, 1)
    chat = {"id": "c", "task": "chat", "prompt": "Tell me a story."}
    with pytest.raises(RewardError, match="row c: rewards.py .*only m applies.* right"):
        preflight(rewards, [row, chat])  # its gold may be in another column
    *_, rewards, row = score_constant_model(math_rule, 1, when="chat")
    notes = preflight(rewards, [row, chat])  # when= shows that the model is meant for these rows
    assert any("on chat rows" in note and "no verdict" in note for note in notes)


def test_errors_in_a_reward_file_name_the_line(tmp_path):
    rewards = load_rewards(write(tmp_path, f"{RULE}\nm = reward_model('./nowhere', name='m')\n"))
    with pytest.raises(RewardError, match=r"^reward function 'm' \(rewards.py:6\), row r1.*./nowhere cannot be loaded"):
        preflight(rewards, [{"id": "r1", "prompt": "q", "answer": "7"}])
    rewards = load_rewards(write(tmp_path, f"{RULE}\nm = reward_model('data/tiny', name='m')\n"))
    with pytest.raises(
        RewardError, match=r"^reward function 'm' \(rewards.py:6\), row r1.*no trained classification head"
    ):
        preflight(rewards, [{"id": "r1", "prompt": "q", "answer": "7"}])
    folder = save(tmp_path / "m")
    two = f"a = reward_model('{folder}', label='x')\nb = reward_model('{folder}', label='y')\n"
    with pytest.raises(RewardError, match="two reward functions are called m: rename one"):
        load_rewards(write(tmp_path, two))


def test_as_a_metric_in_reward_funcs_and_imported(tmp_path):
    folder = save(tmp_path / "m")
    rewards = load_rewards(write(tmp_path, RULE + f"m = reward_model('{folder}', weight=0)\n"))
    score = score_one(rewards, completion("\\boxed{7}", answer="7"))
    assert score.total == 1 and set(score.metrics) == {"m"}
    rewards = load_rewards(write(tmp_path, f"m = reward_model('{folder}')\nreward_funcs = [m]\n"))
    assert rewards.names == ["m"]
    (tmp_path / "shared_rewards_file.py").write_text(f"from grading import *\nm = reward_model('{folder}')\n")
    source = f"import sys\nsys.path.insert(0, '{tmp_path}')\nfrom shared_rewards_file import m\n"
    # Like functions, imported models are used only if they are in reward_funcs.
    assert load_rewards(write(tmp_path, source + RULE)).names == ["correct"]


def test_a_model_is_loaded_once_and_not_on_import(tmp_path):
    folder = save(tmp_path / "m")
    reward_model(folder)(["q"], ["a"])
    loads = _load.cache_info().misses
    reward_model(folder, sigmoid=True)(["q"], ["a"])
    assert _load.cache_info().misses == loads
    source = f"m = reward_model('{folder}')\n"
    code = f"import sys; from grading import load_rewards; load_rewards({write(tmp_path, source)!r}); "
    code += "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
