"""Episodes of several turns: tokens, masks and log-probabilities, ends and errors, and what environments and rewards get."""

import random
import textwrap
import threading
import time
import types

import pytest
import torch
from conftest import fill_lora

from data import DataError, load, load_questions
from data.commands import find_commands
from data.environments import play_moves
from grading import Completion, RewardError, load_rewards, score_all
from rl.advantages import Advantages
from rl.config import Config, ConfigError
from rl.critic import Critic
from rl.evaluate import evaluate
from rl.model.logprobs import completion_logprobs
from rl.model.play import Play
from rl.model.policy import load_policy
from rl.model.sampling import Sampling
from rl.model.turns import render_replies, tool_schemas
from rl.rollout import rollout_and_score, sampled_mask
from rl.update import Updater, prompt_and_completion_ids

ECHO = '''
import random
import time


class Echo:
    """Answers each turn with a letter, five times."""

    prompt = "Play.\\n"
    done = False

    def reset(self, seed=None):
        self.texts = []
        return f"seed {seed}"

    def say(self, text: str) -> str:
        """Say something.

        Args:
            text: Anything.
        """
        self.texts.append(text)
        self.done = len(self.texts) == 5
        return random.choice("abcdefgh") * len(self.texts)

    def get_reward(self):
        return len(self.texts) / 5
'''


def write_class(tmp_path, source=ECHO, name="Echo", file="games.py"):
    (tmp_path / file).write_text(textwrap.dedent(source))
    return f"{tmp_path}/{file}:{name}"


def make(source, **settings):
    """Return config, policy with a random LoRA, questions and rewards for a source of episodes."""
    sizes = {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 220, "max_turn_length": 40}
    config = Config(
        **{"train_data": [source], "eval_questions": 4, "train_questions": 8, "device": "cpu"} | sizes | settings
    )
    policy = load_policy(config)
    fill_lora(policy, 0.02)
    train_rows, _, _ = load_questions(config)
    return config, policy, policy.encode(train_rows), load_rewards("rewards.py", ["wins"])


def play(made, seed=0, step=1, **options):
    config, policy, questions, rewards = made
    generator = torch.Generator().manual_seed(seed)
    return rollout_and_score(policy, questions[:4], 4, Sampling(**options), generator, rewards, config, step)


@pytest.fixture
def echo(tmp_path):
    return make(write_class(tmp_path))


def fallback(made):
    made[1].decoder = None
    return made


@pytest.mark.parametrize("change", [lambda made: made, fallback], ids=["engine", "fallback"])
def test_sampled_tokens_have_the_trainers_logprobs(echo, change):
    episodes = play(change(echo), temperature=1.3)
    echo[1].temperature = 1.3
    logprobs, mask, _ = completion_logprobs(echo[1], *prompt_and_completion_ids(episodes))
    mask &= sampled_mask(episodes)
    sampled = torch.nn.utils.rnn.pad_sequence([torch.tensor(e.sampler_logprobs) for e in episodes], batch_first=True)
    assert max(len(e.completion.turns) for e in episodes) >= 3
    torch.testing.assert_close(logprobs[mask], sampled[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [4, 16])
def test_greedy_episodes_do_not_depend_on_batch_and_path(echo, rows):
    echo[0].rollout_batch_size = rows
    fast = play(echo, temperature=0)
    slow = play(fallback(echo), temperature=0)
    assert [e.completion_ids for e in fast] == [e.completion_ids for e in slow]
    assert [e.is_sampled for e in fast] == [e.is_sampled for e in slow]


def test_tokens_are_turns_and_replies_in_the_form_of_the_template(echo):
    policy = echo[1]
    for episode in play(echo):
        turns = episode.completion.turns
        text = (
            "".join(f"{turn.text}<|end|><|user|>{turn.reply}<|assistant|>" for turn in turns[:-1])
            + turns[-1].text
            + ("" if episode.truncated else "<|end|>")
        )
        assert policy.tokenizer.decode(episode.completion_ids) == text
        flags = episode.is_sampled or [True] * len(episode.completion_ids)
        sampled = [token for token, flag in zip(episode.completion_ids, flags) if flag]
        assert policy.tokenizer.decode(sampled) == "".join(turn.text + "<|end|>" for turn in turns).removesuffix(
            "<|end|>" if episode.truncated else ""
        )
        assert episode.completion.tokens == len(sampled)
        assert policy.tokenizer.decode(episode.prompt_ids).startswith("<|user|>Play.\nseed ")


def test_a_group_shares_its_seed_and_steps_do_not(tmp_path):
    source = write_class(tmp_path)
    (tmp_path / "q.jsonl").write_text("".join(f'{{"prompt": "Play {i}. "}}\n' for i in range(8)))
    made = make(f"{tmp_path}/q.jsonl", environment=source, reward_funcs=["wins"])
    prompts = [[tuple(prompt) for prompt in Play(made[1], made[2][:4], 4, made[0], step).prompts] for step in (1, 2)]
    assert len(prompts[0]) == 4  # one for each group: its first observations are equal
    assert prompts[0] != prompts[1]


def test_the_same_seed_gives_the_same_episodes_and_python_random_is_untouched(echo):
    random.seed(3)
    first = play(echo)
    drawn = random.random()
    random.seed(3)
    assert random.random() == drawn
    assert [e.completion_ids for e in first] == [e.completion_ids for e in play(echo)]


def test_an_episode_ends_when_done_at_max_turns_and_at_its_length(echo):
    config = echo[0]
    for episode in play(echo):
        turns = episode.completion.turns
        assert len(turns) <= 5 and len(episode.completion_ids) <= 220
        assert (episode.reward == 1) == (len(turns) == 5 and not episode.truncated)
    config.max_turns = 2
    assert max(len(e.completion.turns) for e in play(echo)) == 2
    config.max_completion_length = 9
    assert any(e.truncated for e in play(echo))


SLOW = ECHO.replace("self.texts.append(text)", "self.texts.append(text)\n        time.sleep(0.15)")


def test_slow_environments_do_not_hold_up_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("rl.model.play.PATIENCE", 0.01)
    made = make(write_class(tmp_path, SLOW, file="slow.py"))
    made[0].max_turns = 2
    config, policy, questions, rewards = made
    steps = []
    original = Play.replies
    monkeypatch.setattr(Play, "replies", lambda self, block: steps.append(block) or original(self, block))
    episodes = play(made)
    assert steps.count(False) > 3  # other rows were decoded meanwhile
    logprobs, mask, _ = completion_logprobs(policy, *prompt_and_completion_ids(episodes))
    mask &= sampled_mask(episodes)
    sampled = torch.nn.utils.rnn.pad_sequence([torch.tensor(e.sampler_logprobs) for e in episodes], batch_first=True)
    torch.testing.assert_close(logprobs[mask], sampled[mask], atol=1e-4, rtol=0)


# --- errors


def failing(statement):
    return ECHO.replace("self.texts.append(text)", statement)


def test_a_value_error_is_shown_to_the_model(tmp_path):
    made = make(write_class(tmp_path, failing("raise ValueError('no such word')"), file="refuses.py"))
    turns = [turn for episode in play(made) for turn in episode.completion.turns]
    assert {turn.reply for turn in turns} <= {"no such word", ""}


def test_other_errors_stop_the_run_with_class_method_and_row(tmp_path):
    made = make(write_class(tmp_path, failing("text = 1 / 0"), file="broken.py"))
    with pytest.raises(RewardError, match=r"broken.py:Echo.say \(line \d+\), row .*Echo-train-0-\d: ZeroDivisionError"):
        play(made)


def test_with_skip_an_episode_with_an_error_is_left_out(tmp_path):
    made = make(write_class(tmp_path, failing("text = 1 / (len(self.texts) - 0)"), file="skips.py"))
    made[0].reward_errors = made[3].reward_errors = "skip"
    made[3].scored = 10_000
    episodes = play(made)
    played = [e for e in episodes if e.completion.turns and not (e.truncated and len(e.completion.turns) == 1)]
    assert played and all(e.score.verdict == "ungraded" for e in played)


def test_a_call_that_hangs_stops_the_run(tmp_path):
    made = make(write_class(tmp_path, failing("time.sleep(2)"), file="hangs.py"))
    made[0].environment_timeout = 0.2
    with pytest.raises(RewardError, match="Echo.say, row .* took more than 0.2 s"):
        play(made)


@pytest.mark.parametrize("method", ["reset", "get_reward"])
def test_the_other_methods_have_the_same_limit(echo, method):
    config, policy, questions, _ = echo
    config.environment_timeout = 0.2
    game = Play(policy, questions[:1], 1, config, 1)
    row = questions[0].row
    kind = type(game.games[0].environment)
    original = getattr(kind, method)
    setattr(kind, method, lambda self, **options: time.sleep(1))
    try:
        with pytest.raises(RewardError, match=f"Echo.{method}, row {row['id']} took more than 0.2 s"):
            if method == "reset":
                Play(policy, questions[:1], 1, config, 1)
            game.completion(0, [1], False, 1)
    finally:
        setattr(kind, method, original)
        time.sleep(1)  # the call still holds the lock


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.py:Game", "there is no file nowhere.py"),
        ("environments.py:IceMase", "no class IceMase.* Did you mean 'IceMaze'"),
        ("environments.py:Calculator", "no text `prompt`"),
        ("gym:NoSuchGame-v0", "NoSuchGame"),
    ],
)
def test_unusable_classes_are_one_line(source, message):
    with pytest.raises(DataError, match=message):
        load(source, 2)


def test_a_template_that_changes_the_conversation_is_refused(policy):
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last %}{{ m.role }}: {{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(ConfigError, match="chat template of .* cannot be used for several turns"):
        render_replies(policy, [{"role": "user", "content": "yes"}])


# --- training


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "reinforce", "reinforce_plus_plus", "ppo", "a2c", "dpo"])
def test_tokens_of_the_environment_have_no_effect_on_the_update(echo, algorithm):
    """Their advantages, log-probabilities and values may be anything."""
    config, policy, _, rewards = echo
    config.algorithm = algorithm
    config.beta = 0.1
    config.entropy_coef = 0.01 if algorithm != "dpo" else 0
    episodes = play(echo)
    for i, episode in enumerate(episodes):
        episode.reward = episode.score.total = float(i % 3)
    results = []
    critic = Critic(policy, config) if config.has_critic else None
    for noise in (0.0, 100.0):
        updater = Updater(policy, critic, config)
        for episode in episodes:
            episode.old_logprobs = episode.reference_logprobs = episode.values = None
        updater.fill_values(episodes)
        with policy.reference():
            updater.fill_logprobs(episodes, "reference_logprobs")
        for episode in episodes:
            if episode.values is not None and episode.is_sampled:
                flags = torch.tensor([*episode.is_sampled, True])
                episode.values = torch.where(flags, episode.values, noise)
        Advantages(policy, rewards, config).compute(episodes)
        for episode in episodes:
            if episode.is_sampled:
                flags = torch.tensor(episode.is_sampled)
                episode.advantages = torch.where(flags, episode.advantages, noise)
        results.append(
            updater.accumulate(
                updater.optimizer, updater.backward_pairs if updater.uses_pairs else updater.backward, episodes
            )
        )
        gradient = torch.cat([p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None])
        results[-1]["gradient"] = gradient
    assert any(e.is_sampled for e in episodes)
    assert results[0]["tokens"] == sum(e.num_sampled for e in episodes if algorithm != "dpo") or algorithm in (
        "dpo",
        "grpo",
        "rloo",
    )
    torch.testing.assert_close(results[0]["gradient"], results[1]["gradient"])
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-6)


SCORED = ECHO.replace(
    "    def get_reward", "    def score(self):\n        return min(len(self.texts), 2) / 10\n\n    def get_reward"
)


def test_a_score_is_the_reward_of_its_turn(tmp_path):
    made = make(write_class(tmp_path, SCORED, file="scored.py"))
    config, policy, _, rewards = made
    config.algorithm, config.gamma, config.baseline = "reinforce", 1.0, "none"
    episodes = play(made)
    Advantages(policy, rewards, config).compute(episodes)
    long = max(episodes, key=lambda e: len(e.completion.turns))
    ends = long.turn_ends()
    returns = [long.advantages[end].item() for end in ends]
    changes = [a - b for a, b in zip(returns, returns[1:])]
    assert changes == pytest.approx([0.1, 0.1, 0.0, 0.0][: len(changes)], abs=1e-6) and len(changes) >= 2
    assert returns[0] == pytest.approx(long.reward, abs=1e-6)


def test_evaluation_records_turns(echo):
    config, policy, questions, rewards = echo
    evaluation = evaluate(policy, questions[:2], rewards, config, 0)
    for line in evaluation.lines():
        assert line["turns"][0].keys() == {"text", "reply"} and line["verdict"] in ("right", "wrong")


def test_no_thread_is_left_after_a_roll_out(echo):
    play(echo)
    before = threading.active_count()
    for step in range(3):
        play(echo, step=step)
    assert threading.active_count() <= before, threading.enumerate()


def test_a_column_environment_with_other_data_is_left_alone(tmp_path):
    (tmp_path / "q.jsonl").write_text(
        "".join(f'{{"prompt": "{i} + 1?", "environment": "production"}}\n' for i in range(8))
    )
    made = make(f"{tmp_path}/q.jsonl", max_completion_length=8)
    assert all(
        not e.completion.turns and e.is_sampled is None
        for e in play((*made[:3], load_rewards("rewards.py", ["format"])))
    )


def test_questions_and_games_are_mixed(tmp_path):
    made = make("sums", train_data=["sums", write_class(tmp_path)], train_questions=2)
    questions = sorted(made[2], key=lambda question: question.row["task"])[:4]
    episodes = play((made[0], made[1], questions, load_rewards("rewards.py", ["correct", "wins"])))
    assert {(e.score.judge, bool(e.completion.turns)) for e in episodes} == {("correct", False), ("wins", True)}


TRL_SHAPES = {
    "counter": "def reset(self, **kwargs) -> str | None:\n        self.n = 0\n        return 'at 0 '\n    def add(self, by: str) -> str:\n"
    '        """Add.\n\n        Args:\n            by: Number.\n        """\n        self.n += 1\n        return str(self.n)\n',
    "silent": "def reset(self, **kwargs):\n        self.row = kwargs\n    def look(self) -> str:\n"
    '        """Look."""\n        return self.row["secret"]\n',
    "rewarded": "def reset(self, secret, **kwargs) -> None:\n        self.secret = secret\n    def guess(self, word: str) -> str:\n"
    '        """Guess.\n\n        Args:\n            word: A word.\n        """\n        return "no"\n'
    "    def get_reward(self) -> float:\n        return 0.25\n",
    "awaited": "def reset(self, **kwargs) -> None:\n        pass\n    async def wait(self, seconds: str) -> str:\n"
    '        """Wait.\n\n        Args:\n            seconds: A number.\n        """\n        return "done"\n'
    "    async def get_reward(self) -> float:\n        return 0.5\n",
    "tool named score": "def reset(self, **kwargs) -> None:\n        pass\n    def score(self, text: str) -> str:\n"
    '        """Score.\n\n        Args:\n            text: Text.\n        """\n        return "7"\n',
}


@pytest.mark.parametrize("shape", TRL_SHAPES)
def test_classes_written_for_trl_run_unchanged(tmp_path, shape):
    name = write_class(tmp_path, f"class Shape:\n    {TRL_SHAPES[shape]}", "Shape", f"{shape.replace(' ', '_')}.py")
    (tmp_path / "q.jsonl").write_text("".join(f'{{"prompt": "Play {i}. ", "secret": "word"}}\n' for i in range(8)))
    (tmp_path / "rewards.py").write_text(
        "reward_funcs = ['f']\ndef f(completions, environments, secret, **kwargs):\n"
        "    return [float(type(e).__name__ == 'Shape' and s == 'word') for e, s in zip(environments, secret)]\n"
    )
    made = make(f"{tmp_path}/q.jsonl", environment=name, max_completion_length=60, play="text")
    config, policy, questions, _ = made
    tools = tool_schemas(name)
    assert len(tools) == 1
    game = Play(policy, questions[:1], 1, config, 1)
    command = tools[0]["function"]["name"]
    argument = "1" if tools[0]["function"]["parameters"]["properties"] else ""
    game.end_turn(0, policy.tokenizer.encode(f"{command}({argument})<|end|>", add_special_tokens=False))
    (reply,) = game.replies(block=True).values()
    expected = {"counter": "1", "silent": "word", "rewarded": "no", "awaited": "done", "tool named score": "7"}[shape]
    assert policy.tokenizer.decode(reply) == f"<|user|>{expected}<|assistant|>"
    assert game.completion(0, [1], False, 1).environment_reward == {"rewarded": 0.25, "awaited": 0.5}.get(shape)
    episodes = play((*made[:3], load_rewards(str(tmp_path / "rewards.py"))))
    assert [e.reward for e in episodes] == [1.0] * 16


# --- commands and tools


def add(a: int, b: int = 2) -> int:
    """Add."""


def say(text: str) -> str:
    """Say."""


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Let me see.\nadd(1, 2)", [("add", {"a": 1, "b": 2})]),
        ("add(b=3, a=1)", [("add", {"a": 1, "b": 3})]),
        ("say(12+34)", [("say", {"text": "12+34"})]),
        ("say('up')", [("say", {"text": "up"})]),
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', [("add", {"a": 1})]),
        ('<tool_call>{"name": "x", "arguments": {}}</tool_call><tool_call>{"name": "say", "arguments": {"text": "y"}}</tool_call>',
         [("x", {}), ("say", {"text": "y"})]),
        ("<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n4\n</parameter>\n</function>\n</tool_call>",
         [("add", {"a": 1, "b": 4})]),
        ("<function=say><parameter=text>5</parameter></function>", [("say", {"text": "5"})]),
        ('{"name": "say", "parameters": {"text": "y"}}', [("say", {"text": "y"})]),
        ("The answer is 5.", []),
        ("drop(1)", []),
        ("", []),
    ],
)  # fmt: skip
def test_commands(answer, expected):
    assert find_commands(answer, {"add": add, "say": say}, takes_bare=True) == expected


def test_a_bare_answer_is_the_argument_of_the_only_tool():
    assert find_commands("I go\nup", {"say": say}, takes_bare=True) == [("say", {"text": "up"})]
    assert find_commands("up", {"say": say}, takes_bare=False) == []


@pytest.mark.parametrize(
    "answer",
    ["add(1, )()", "add(__import__('os'))", "add(1, 2, 3)", "<tool_call>{bad}</tool_call>", "add(" + "(" * 500 + ")"],
)
def test_unreadable_commands_are_messages_for_the_model(answer):
    with pytest.raises(ValueError, match="form|cannot be read"):
        find_commands(answer, {"add": add}, takes_bare=True)


def test_rewards_of_trl_get_environments_and_messages(tmp_path):
    source = "reward_funcs = ['f']\ndef f(completions, environments, **kwargs):\n    return [e.points + len([m['content'] for m in c]) for c, e in zip(completions, environments)]\n"
    (tmp_path / "rewards.py").write_text(source)
    rewards = load_rewards(str(tmp_path / "rewards.py"))
    completion = Completion("q", "b", {"id": "1"}, environment=types.SimpleNamespace(points=2))
    completion.turns = [types.SimpleNamespace(text="a", reply="r"), types.SimpleNamespace(text="b", reply="")]
    assert score_all(rewards, [completion])[0].total == 5  # 2 points, 3 messages


def test_schemas_need_docstrings(tmp_path):
    name = write_class(
        tmp_path,
        "class Bare:\n    def reset(self):\n        pass\n    def act(self, x):\n        pass\n",
        "Bare",
        "bare.py",
    )
    with pytest.raises(ConfigError, match="Bare.act"):
        tool_schemas(name)
    assert tool_schemas("environments.py:IceMaze")[0]["function"]["name"] == "move"


def test_held_out_games_are_not_trained_on():
    config = Config(train_data=["environments.py:IceMaze"], train_questions=300, eval_questions=100)
    train_rows, eval_rows, _ = load_questions(config)
    assert len(train_rows) == 300 and len(eval_rows) == 100
    assert not {row["observation"] for row in train_rows} & {row["observation"] for row in eval_rows}


# --- parity with TRL

TOOL_TEMPLATE = """\
{%- if tools %}<|system|>{{ tools | tojson }}{% endif -%}
{%- for m in messages -%}
<|{{ m.role if m.role != 'tool' else 'user' }}|>{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor -%}
{%- if m.role == 'assistant' %}<|end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""


def test_an_episode_has_trls_tokens_and_mask(tmp_path, monkeypatch):
    """The same turns through TRL's tool loop, with its generation replaced, and through ours."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    made = make(write_class(tmp_path, file="parity.py"), play="tools", max_turn_length=None)
    config, policy, questions, _ = made
    tokenizer = policy.tokenizer
    tokenizer.chat_template = TOOL_TEMPLATE
    call = '<tool_call>{"name": "say", "arguments": {"text": "%s"}}</tool_call>'
    texts = [call % "one", "<think>hm</think>" + call % "two", "the end"]
    turns = [tokenizer.encode(text + "<|end|>", add_special_tokens=False) for text in texts]

    ours = Play(policy, questions[:1], 1, config, 1)
    ids, mask = [], []
    for turn in turns:
        ids += turn
        mask += [1] * len(turn)
        ours.end_turn(0, turn)
        reply = ours.replies(block=True)[0]
        ids += reply or []
        mask += [0] * len(reply or [])

    environment = ours.games[0].environment
    replies = iter([turn.reply for turn in ours.games[0].turns])

    def parsed(text):
        calls = [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in find_commands(text, {"say": environment.say}, takes_bare=False)
        ]
        return {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})

    remaining = iter(list(zip(texts, turns))[1:])

    def generate(prompt_ids, *args, **kwargs):
        text, turn = next(remaining)
        generate.text = text
        return [turn], None

    def parse(processor, ids, *args, **kwargs):
        return parsed(generate.text)

    monkeypatch.setattr(grpo_trainer, "parse_response", parse, raising=False)
    fake = types.SimpleNamespace(
        max_tool_calling_iterations=10, _sync_tool_dicts=[{"say": lambda text: next(replies)}], _async_tool_dicts=[{}],
        use_vllm=False, _is_vlm=False, tools=[environment.say], model=policy.model, max_completion_length=config.max_completion_length,
        processing_class=tokenizer, _tokenizer=tokenizer, chat_template=None, chat_template_kwargs={}, _generate_single_turn=generate,
        environment_factories=None, pad_token_id=policy.pad_id, eos_token_id=tokenizer.eos_token_id, vllm_mode=None,
    )  # fmt: skip
    fake._get_tool_suffix_ids = types.MethodType(grpo_trainer.GRPOTrainer._get_tool_suffix_ids, fake)
    tool_mask, _, completion_ids, *_ = grpo_trainer.GRPOTrainer._tool_call_loop(
        fake,
        [[{"role": "user", "content": "Play."}]],
        [questions[0].prompt_ids],
        [list(turns[0])],
        [[parsed(texts[0])]],
        None,
        None,
        {},
    )
    assert tokenizer.decode(completion_ids[0]) == tokenizer.decode(ids)
    assert completion_ids[0] == ids
    assert tool_mask[0] == mask


FUNCTIONS = """
def multiply(a: int, b: int) -> int:
    \"\"\"Multiply two numbers.

    Args:
        a: The first number.
        b: The second number.
    \"\"\"
    return a * b


def halve(number: int) -> float:
    \"\"\"Halve a number.

    Args:
        number: Any number.
    \"\"\"
    return number / 2
"""


def test_plain_functions_are_tools(tmp_path):
    (tmp_path / "tools.py").write_text(FUNCTIONS)
    name = f"{tmp_path}/tools.py:multiply,halve"
    assert [schema["function"]["name"] for schema in tool_schemas(name)] == ["multiply", "halve"]
    row = {"id": "1", "prompt": "2 * 3?"}
    texts = iter(["multiply(2, 3)", "halve(6)", "It is 3."])
    turns, _ = play_moves(name, row, lambda _: next(texts))
    assert [reply for _, reply in turns] == ["6", "3.0", ""]
    made = make("sums", environment=name)
    assert all(episode.completion.turns for episode in play((*made[:3], load_rewards("rewards.py", ["format"]))))
    with pytest.raises(DataError, match="has no class multiply,half with a method reset"):
        tool_schemas(f"{tmp_path}/tools.py:multiply,half")


def test_an_exit_in_a_tool_is_an_error_of_the_environment(tmp_path):
    made = make(write_class(tmp_path, failing("raise SystemExit(0)"), file="exits.py"))
    with pytest.raises(RewardError, match=r"exits.py:Echo.say \(line \d+\), row .*: SystemExit"):
        play(made)


def test_constructor_and_methods_run_in_one_thread(tmp_path):
    source = ECHO.replace(
        "def reset(self, seed=None):",
        """def __init__(self):
        import sqlite3

        self.database = sqlite3.connect(":memory:")

    def reset(self, seed=None):
        self.database.execute("select 1")""",
    )
    assert play(make(write_class(tmp_path, source, file="database.py")))
