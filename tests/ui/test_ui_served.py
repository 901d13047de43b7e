"""The tab Compare through the served page, as a client meets it: an empty runs folder, two visitors, stopping, what is broken."""

import html
import shutil
import time

import pytest
import safetensors.torch
from conftest import fill_lora

pytest.importorskip("gradio")

from gradio_client import Client  # noqa: E402
from test_ui_compare_tab import HOSTILE, ONE, make_run  # noqa: E402
from test_ui_worker import PERTURBED, QUESTION, plain  # noqa: E402

from rl.config import Config  # noqa: E402
from rl.model.policy import load_policy, save_adapter  # noqa: E402
from ui import app  # noqa: E402
from ui.chat import BASE  # noqa: E402
from ui.worker import Worker  # noqa: E402


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page over a folder without runs, the folder, what a plain policy answers to a question, and the worker."""
    folder, workers = tmp_path_factory.mktemp("served") / "runs", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "Worker", lambda runs: workers.append(Worker(runs)) or workers[-1])
        blocks, url = app.launch(app.Settings(runs=folder, port=0))
    policy = load_policy(Config(device="cpu"))
    with policy.reference():
        text = plain(policy, max_tokens=90)[0]
    yield url, folder, policy, text, workers[0]
    blocks.close()


@pytest.fixture
def run(served):
    """The folder of a run whose LoRA answers otherwise, and how."""
    _, folder, policy, base, _ = served
    fill_lora(policy, PERTURBED)
    save_adapter(policy, make_run(folder) / "checkpoints/step_000001")
    tuned = plain(policy, max_tokens=90)[0]
    assert tuned != base
    yield folder / "one", tuned
    shutil.rmtree(folder / "one")


def put(client, question, left=BASE, right=BASE, expected="", longest=90, **more):
    how = {"greedy": True, "temperature": 1.0, "samples": 1} | more
    return client.submit(
        left,
        right,
        False,
        question,
        expected,
        how["greedy"],
        how["temperature"],
        1.0,
        0,
        longest,
        how["samples"],
        api_name="/ask",
    )


def shown(outputs, side):
    return [message["content"][0]["text"] for message in outputs[side]["value"]]


def test_an_empty_runs_folder_and_then_a_run(served):
    url, folder, policy, base, _ = served
    client = Client(url, verbose=False)
    assert not folder.exists()
    outputs = put(client, QUESTION, expected="13").result(60)
    assert shown(outputs, 0) == shown(outputs, 1) == [QUESTION, base]
    assert outputs[2] == outputs[3] == "wrong. Reward 0.1. Expected: 13"
    fill_lora(policy, PERTURBED)
    save_adapter(policy, make_run(folder) / "checkpoints/step_000001")
    question, number = client.predict(BASE, ONE, 1, api_name="/held_out")
    assert (question, number) == (QUESTION, 1)
    outputs = put(client, question, right=ONE).result(60)
    assert shown(outputs, 0) == [QUESTION, base]
    assert shown(outputs, 1) == [QUESTION, html.escape(plain(policy, max_tokens=90)[0])]
    assert "Expected: 13" in outputs[2]
    for wrong, words in (
        ("../../etc/passwd", "There is no run"),
        ("one/../../x", "has no checkpoint"),
        (7, "There is no run"),
    ):
        if words == "There is no run":
            with pytest.raises(Exception, match=words):
                put(client, question, right=wrong).result(20)
        else:
            assert words in put(client, question, right=wrong).result(20)[3]
    shutil.rmtree(folder / "one")


def test_stopped_through_the_page_and_gone_on(served):
    url, _, _, base, _ = served
    one, other = Client(url, verbose=False), Client(url, verbose=False)
    for _ in range(3):
        job = put(one, QUESTION, greedy=False, temperature=2.0, longest=450, samples=16)
        while len(job.outputs()) < 3 and not job.done():
            time.sleep(0.01)
        for _ in range(3):
            one.predict(api_name="/stop")
        assert "Stopped after" in job.result(20)[6]
        assert "no verdict" in job.result()[2]
    assert shown(put(other, QUESTION).result(20), 0) == [QUESTION, base]  # nothing of the other visitor's
    one.predict(api_name="/new_chat")
    assert shown(put(one, QUESTION).result(20), 0) == [QUESTION, base]


def test_cancelled_three_times_and_left(served):
    """The client cancels the event itself, or goes away: nothing is left that is being answered, or that holds a lock."""
    url, _, _, base, worker = served
    for leave in (lambda _, job: [job.cancel() for _ in range(3)], lambda client, _: client.close()):
        client = Client(url, verbose=False)
        job = put(client, QUESTION, greedy=False, temperature=2.0, longest=450, samples=16)
        while len(job.outputs()) < 3 and not job.done():
            time.sleep(0.01)
        leave(client, job)
        until = time.monotonic() + 10
        while worker._jobs and time.monotonic() < until:
            time.sleep(0.05)
        assert worker._jobs == []
        assert shown(put(Client(url, verbose=False), QUESTION).result(20), 0) == [QUESTION, base]


def test_errors_are_said_in_words(served):
    url, folder, *_ = served
    client = Client(url, verbose=False)
    with pytest.raises(Exception, match="There is no question"):
        put(client, "").result(20)
    with pytest.raises(Exception, match="There is no run &#x27;one&#x27;"):
        put(client, "What?", right=ONE).result(20)
    outputs = put(client, "1 + " * 300).result(20)
    assert "the model reads 512 at most" in shown(outputs, 0)[-1] and outputs[6].startswith("Failed after")
    outputs = put(client, QUESTION).result(20)
    assert shown(outputs, 0) == [QUESTION, served[3]], "nothing of it is asked again"
    with pytest.raises(Exception, match="Longest answer: give a number of tokens"):
        put(client, QUESTION, longest=-1).result(20)
    with pytest.raises(Exception, match="numbered from 1 to"):
        client.predict(BASE, BASE, 10_000, api_name="/held_out")


def test_two_visitors_at_once(served, run):
    """The base is the base, also while the other side and another visitor's sides stream."""
    url, _, _, base, _ = served
    one, other = Client(url, verbose=False), Client(url, verbose=False)
    long = put(one, QUESTION, right=ONE, greedy=False, temperature=2.0, longest=450, samples=16)
    while len(long.outputs()) < 3 and not long.done():
        time.sleep(0.01)
    for i in range(3):
        outputs = put(other, QUESTION, right=ONE).result(60)
        assert i or not long.done(), "they were not at once"
        other.predict(api_name="/new_chat")
        assert shown(outputs, 0) == [QUESTION, base] and shown(outputs, 1) == [QUESTION, html.escape(run[1])]
    one.predict(api_name="/stop")


def test_a_broken_adapter_and_a_base_that_does_not_match(served, run):
    url, _, _, base, _ = served
    weights = run[0] / "checkpoints/step_000001/adapter_model.safetensors"
    whole = weights.read_bytes()
    client = Client(url, verbose=False)
    weights.write_bytes(whole[:5000])
    outputs = put(client, QUESTION, right=ONE).result(60)
    assert shown(outputs, 0) == [QUESTION, base]
    assert "step_000001 cannot be put on data/tiny" in shown(outputs, 1)[-1] == html.escape(outputs[3])
    weights.unlink()
    assert "has no adapter_model.safetensors" in put(client, QUESTION, right=ONE).result(60)[3]
    tensors = {name: tensor[..., :4].contiguous() for name, tensor in safetensors.torch.load(whole).items()}
    safetensors.torch.save_file(tensors, weights)  # as of a narrower model
    assert "cannot be put on data/tiny: " in put(client, QUESTION, right=ONE).result(60)[3]
    weights.write_bytes(whole)
    client.predict(api_name="/new_chat")
    assert shown(put(client, QUESTION, right=ONE).result(60), 1) == [QUESTION, html.escape(run[1])]


def test_reward_files_that_fail(served, run):
    """The answers are shown all the same, with the reason in the place of a verdict."""
    url, _, _, base, _ = served
    client = Client(url, verbose=False)
    for source, words in (
        ("from grading import reward\n@reward\ndef bad(c):\n    return c.nothing\n", "'bad' (rewards.py:4)"),
        ("def bad(:\n", "rewards.py:1: SyntaxError"),
        ("import not_there_at_all\n", "rewards.py:1: ModuleNotFoundError"),
        ("x = 1\n", "rewards.py"),
    ):
        (run[0] / "rewards.py").write_text(source)
        outputs = put(client, QUESTION, right=ONE, expected="13").result(60)
        client.predict(api_name="/new_chat")
        assert shown(outputs, 0) == [QUESTION, base]
        assert all("No verdict: " in said and words in said for said in outputs[2:4]), outputs[2]


def test_reward_functions_that_go_on_for_ever_are_stopped(served, run):
    (run[0] / "rewards.py").write_text("from grading import reward\n@reward\ndef endless(c):\n    while True: pass\n")
    client = Client(served[0], verbose=False)

    def judging():
        job = put(client, QUESTION, right=ONE, expected="13")
        while not any("judge" in outputs[6] for outputs in job.outputs() if isinstance(outputs[6], str)):
            time.sleep(0.05)
        return job

    job = judging()
    client.predict(api_name="/stop")
    assert "No verdict: stopped" in job.result(5)[2]
    job = judging()
    client.predict(api_name="/new_chat")
    assert "judge" in job.result(5)[6], "it says no more of the chat that is gone"
    assert shown(put(client, QUESTION).result(20), 0) == [QUESTION, served[3]]


@pytest.mark.parametrize(
    "text", [HOSTILE, "<think>", "</think><b>", "<!--", "x" * 50_000, "$$\\href{javascript:alert(1)}{x}$$", "\0\u202e"]
)
def test_hostile_text_stays_text(served, run, text):
    """As a question, as what is expected, and as what a reward function says."""
    (run[0] / "rewards.py").write_text(
        f"from grading import reward\n@reward\ndef says(c):\n    return 0.5, {text!r}\n", encoding="utf-8"
    )
    client = Client(served[0], verbose=False)
    outputs = put(client, text, right=ONE, expected=text).result(60)
    question = outputs[0]["value"][0]["content"][0]["text"]
    assert not set("<>") & set(question.replace("<br>", "")) and len(question) < 50_000
    raw = html.unescape(question.replace("<br>", "\n").replace("&nbsp;", " "))
    assert raw == text or raw.startswith(text[:20_000]) and raw.endswith("(30,000 more characters are not shown)")
    if len(text) < 50_000:
        assert f"Expected: {text.strip()}" in outputs[2] and outputs[4]["data"][0][4].strip() == text.strip()
    else:
        assert "the model reads 512 at most" in outputs[2]
