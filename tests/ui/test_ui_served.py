"""The Compare tab through the served page: an empty runs folder, two visitors, stopping, errors, hostile text."""

import html
import shutil
import time

import pytest
import safetensors.torch
from conftest import fill_lora

pytest.importorskip("gradio")

from gradio_client import Client  # noqa: E402
from test_ui_compare_tab import CHECKPOINT, HOSTILE, make_run  # noqa: E402
from test_ui_worker import PERTURBED, QUESTION, rollout_texts  # noqa: E402

from rl.config import Config  # noqa: E402
from rl.model.lora import save_adapter  # noqa: E402
from rl.model.policy import load_policy  # noqa: E402
from ui import app  # noqa: E402
from ui.chat import BASE  # noqa: E402
from ui.worker import Worker  # noqa: E402


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Serve the page without runs. Yield its address, the runs folder, a policy, its base answer, and the worker."""
    folder = tmp_path_factory.mktemp("served") / "runs"
    workers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "Worker", lambda runs: workers.append(Worker(runs)) or workers[-1])
        blocks, url = app.launch(app.Settings(runs=folder, port=0))
    policy = load_policy(Config(device="cpu"))
    with policy.reference():
        text = rollout_texts(policy, max_tokens=90)[0]
    yield url, folder, policy, text, workers[0]
    blocks.close()


@pytest.fixture
def run(served):
    """Make a run whose LoRA answers differently. Yield its folder and its answer."""
    _, folder, policy, base, _ = served
    fill_lora(policy, PERTURBED)
    save_adapter(policy, make_run(folder) / "checkpoints/step_000001")
    lora_answer = rollout_texts(policy, max_tokens=90)[0]
    assert lora_answer != base
    yield folder / "one", lora_answer
    shutil.rmtree(folder / "one")


def submit(client, question, left=BASE, right=BASE, expected="", max_tokens=90, **options):
    options = {"greedy": True, "temperature": 1.0, "samples": 1} | options
    return client.submit(
        left,
        right,
        False,
        question,
        expected,
        options["greedy"],
        options["temperature"],
        1.0,
        0,
        max_tokens,
        options["samples"],
        api_name="/ask",
    )


def chat_texts(outputs, side):
    return [message["content"][0]["text"] for message in outputs[side]["value"]]


def test_first_run_in_an_empty_folder(served):
    url, folder, policy, base, _ = served
    client = Client(url, verbose=False)
    assert not folder.exists()
    outputs = submit(client, QUESTION, expected="13").result(60)
    assert chat_texts(outputs, 0) == chat_texts(outputs, 1) == [QUESTION, base]
    assert outputs[2] == outputs[3] == "wrong. Reward 0.1. Expected: 13"
    fill_lora(policy, PERTURBED)
    save_adapter(policy, make_run(folder) / "checkpoints/step_000001")
    question, number = client.predict(BASE, CHECKPOINT, 1, api_name="/held_out")
    assert (question, number) == (QUESTION, 1)
    outputs = submit(client, question, right=CHECKPOINT).result(60)
    assert chat_texts(outputs, 0) == [QUESTION, base]
    assert chat_texts(outputs, 1) == [QUESTION, html.escape(rollout_texts(policy, max_tokens=90)[0])]
    assert "Expected: 13" in outputs[2]
    for value, message in (
        ("../../etc/passwd", "no run"),
        ("one/../../x", "has no checkpoint"),
        (7, "no run"),
    ):
        if message == "no run":
            with pytest.raises(Exception, match=message):
                submit(client, question, right=value).result(20)
        else:
            assert message in submit(client, question, right=value).result(20)[3]
    shutil.rmtree(folder / "one")


def test_next_question_is_answered_after_stop(served):
    url, _, _, base, _ = served
    first, second = Client(url, verbose=False), Client(url, verbose=False)
    for _ in range(3):
        job = submit(first, QUESTION, greedy=False, temperature=2.0, max_tokens=450, samples=16)
        while len(job.outputs()) < 3 and not job.done():
            time.sleep(0.01)
        for _ in range(3):
            first.predict(api_name="/stop")
        assert "Stopped after" in job.result(20)[6]
        assert "no verdict" in job.result()[2]
    assert chat_texts(submit(second, QUESTION).result(20), 0) == [QUESTION, base]  # without traces of the other visitor
    first.predict(api_name="/new_chat")
    assert chat_texts(submit(first, QUESTION).result(20), 0) == [QUESTION, base]


def test_cancelled_and_abandoned_questions(served):
    """If the client cancels the event or disconnects, no question stays in progress and no lock is held."""
    url, _, _, base, worker = served
    for leave in (lambda _, job: [job.cancel() for _ in range(3)], lambda client, _: client.close()):
        client = Client(url, verbose=False)
        job = submit(client, QUESTION, greedy=False, temperature=2.0, max_tokens=450, samples=16)
        while len(job.outputs()) < 3 and not job.done():
            time.sleep(0.01)
        leave(client, job)
        deadline = time.monotonic() + 10
        while worker._jobs and time.monotonic() < deadline:
            time.sleep(0.05)
        assert worker._jobs == []
        assert chat_texts(submit(Client(url, verbose=False), QUESTION).result(20), 0) == [QUESTION, base]


def test_error_messages(served):
    url, folder, *_ = served
    client = Client(url, verbose=False)
    with pytest.raises(Exception, match="no question"):
        submit(client, "").result(20)
    with pytest.raises(Exception, match="&#x27;one&#x27;"):
        submit(client, "What?", right=CHECKPOINT).result(20)
    outputs = submit(client, "1 + " * 300).result(20)
    assert "context length of the model is 512" in chat_texts(outputs, 0)[-1] and outputs[6].startswith("Failed after")
    outputs = submit(client, QUESTION).result(20)
    assert chat_texts(outputs, 0) == [QUESTION, served[3]], "the failed question must not be sent again"
    with pytest.raises(Exception, match="Maximum answer length"):
        submit(client, QUESTION, max_tokens=-1).result(20)
    with pytest.raises(Exception, match="from 1 to"):
        client.predict(BASE, BASE, 10_000, api_name="/held_out")


def test_two_visitors_at_once(served, run):
    """Each side answers with its own model while the answers of another visitor stream."""
    url, _, _, base, _ = served
    first, second = Client(url, verbose=False), Client(url, verbose=False)
    long_job = submit(first, QUESTION, right=CHECKPOINT, greedy=False, temperature=2.0, max_tokens=450, samples=16)
    while len(long_job.outputs()) < 3 and not long_job.done():
        time.sleep(0.01)
    for i in range(3):
        outputs = submit(second, QUESTION, right=CHECKPOINT).result(60)
        assert i or not long_job.done(), "the questions did not overlap"
        second.predict(api_name="/new_chat")
        assert chat_texts(outputs, 0) == [QUESTION, base] and chat_texts(outputs, 1) == [QUESTION, html.escape(run[1])]
    first.predict(api_name="/stop")


def test_broken_and_mismatched_adapters(served, run):
    url, _, _, base, _ = served
    weights = run[0] / "checkpoints/step_000001/adapter_model.safetensors"
    content = weights.read_bytes()
    client = Client(url, verbose=False)
    weights.write_bytes(content[:5000])
    outputs = submit(client, QUESTION, right=CHECKPOINT).result(60)
    assert chat_texts(outputs, 0) == [QUESTION, base]
    assert "step_000001 does not fit data/tiny" in chat_texts(outputs, 1)[-1] == html.escape(outputs[3])
    weights.unlink()
    assert "has no adapter_model.safetensors" in submit(client, QUESTION, right=CHECKPOINT).result(60)[3]
    tensors = {name: tensor[..., :4].contiguous() for name, tensor in safetensors.torch.load(content).items()}
    safetensors.torch.save_file(tensors, weights)  # like the adapter of a narrower model
    assert "does not fit data/tiny: " in submit(client, QUESTION, right=CHECKPOINT).result(60)[3]
    weights.write_bytes(content)
    client.predict(api_name="/new_chat")
    assert chat_texts(submit(client, QUESTION, right=CHECKPOINT).result(60), 1) == [QUESTION, html.escape(run[1])]


def test_reward_files_that_fail(served, run):
    """The answers are shown, with the error in place of a verdict."""
    url, _, _, base, _ = served
    client = Client(url, verbose=False)
    for source, message in (
        ("from grading import reward\n@reward\ndef bad(c):\n    return c.nothing\n", "'bad' (rewards.py:4)"),
        ("def bad(:\n", "rewards.py:1: SyntaxError"),
        ("import missing_module\n", "rewards.py:1: ModuleNotFoundError"),
        ("x = 1\n", "rewards.py"),
    ):
        (run[0] / "rewards.py").write_text(source)
        outputs = submit(client, QUESTION, right=CHECKPOINT, expected="13").result(60)
        client.predict(api_name="/new_chat")
        assert chat_texts(outputs, 0) == [QUESTION, base]
        assert all("No verdict: " in text and message in text for text in outputs[2:4]), outputs[2]


def test_stop_ends_endless_reward_functions(served, run):
    (run[0] / "rewards.py").write_text("from grading import reward\n@reward\ndef endless(c):\n    while True: pass\n")
    client = Client(served[0], verbose=False)

    def start_scoring():
        job = submit(client, QUESTION, right=CHECKPOINT, expected="13")
        while not any("Scoring" in outputs[6] for outputs in job.outputs() if isinstance(outputs[6], str)):
            time.sleep(0.05)
        return job

    job = start_scoring()
    client.predict(api_name="/stop")
    assert "No verdict: " in job.result(5)[2] and "stopped" in job.result(5)[2].lower()
    job = start_scoring()
    client.predict(api_name="/new_chat")
    assert "Scoring" in job.result(5)[6], "a removed chat gets no further updates"
    assert chat_texts(submit(client, QUESTION).result(20), 0) == [QUESTION, served[3]]


@pytest.mark.parametrize(
    "text", [HOSTILE, "<think>", "</think><b>", "<!--", "x" * 50_000, "$$\\href{javascript:alert(1)}{x}$$", "\0\u202e"]
)
def test_hostile_text_is_escaped(served, run, text):
    """Hostile text as a question, as the expected answer, and as the reason of a reward function."""
    (run[0] / "rewards.py").write_text(
        f"from grading import reward\n@reward\ndef reason(c):\n    return 0.5, {text!r}\n", encoding="utf-8"
    )
    client = Client(served[0], verbose=False)
    outputs = submit(client, text, right=CHECKPOINT, expected=text).result(60)
    question = outputs[0]["value"][0]["content"][0]["text"]
    assert not set("<>") & set(question.replace("<br>", "")) and len(question) < 50_000
    raw = html.unescape(question.replace("<br>", "\n").replace("&nbsp;", " "))
    assert raw == text or raw.startswith(text[:20_000]) and raw.endswith("(30,000 more characters are not shown)")
    if len(text) < 50_000:
        assert f"Expected: {text.strip()}" in outputs[2] and outputs[4]["data"][0][4].strip() == text.strip()
    else:
        assert "context length of the model is 512" in outputs[2]
