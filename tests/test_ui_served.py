"""The tab Compare through the served page, as a client meets it: an empty runs folder, stopping, leaving, errors in words."""

import shutil
import time

import pytest
from conftest import fill_lora

pytest.importorskip("gradio")

from gradio_client import Client  # noqa: E402
from test_ui_compare import ONE, make_run  # noqa: E402
from test_ui_worker import PERTURBED, QUESTION, plain  # noqa: E402

from rl.config import Config  # noqa: E402
from rl.policy import load_policy, save_adapter  # noqa: E402
from ui import app  # noqa: E402
from ui.chat import BASE  # noqa: E402
from ui.worker import Worker  # noqa: E402


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page over a folder without runs, the folder, what a plain policy answers to a question, and the worker."""
    folder, workers = tmp_path_factory.mktemp("served") / "runs", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "Worker", lambda runs: workers.append(Worker(runs)) or workers[-1])
        blocks = app.build(app.Settings(runs=folder))
    _, url, _ = blocks.queue().launch(prevent_thread_lock=True, quiet=True, server_port=None)
    policy = load_policy(Config(device="cpu"))
    with policy.reference():
        text = plain(policy, max_tokens=90)[0]
    yield url, folder, policy, text, workers[0]
    blocks.close()


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
    outputs = put(client, QUESTION, expected="13").result(60)
    assert shown(outputs, 0) == shown(outputs, 1) == [QUESTION, base]
    assert outputs[2] == outputs[3] == "wrong. Reward 0.1. Expected: 13"
    fill_lora(policy, PERTURBED)
    make_run(folder)
    save_adapter(policy, folder / "one/checkpoints/step_000001")
    question, number = client.predict(BASE, ONE, 1, api_name="/held_out")
    assert (question, number) == (QUESTION, 1)
    outputs = put(client, question, right=ONE).result(60)
    tuned = plain(policy, max_tokens=90)[0]
    assert (
        shown(outputs, 0)
        == [QUESTION, base]
        != shown(outputs, 1)
        == [QUESTION, tuned.replace("<", "&lt;").replace(">", "&gt;")]
    )
    assert "Expected: 13" in outputs[2]
    for wrong in ("../../etc/passwd", "one/../../x", "one/step_000002"):
        words = put(client, question, right=wrong)
        with (
            pytest.raises(Exception, match="There is no run")
            if wrong.startswith("..")
            else pytest.raises(AssertionError)
        ):
            assert "has no checkpoint" not in words.result(60)[3]
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
    assert "context is 512" in shown(put(client, "1 + " * 300).result(20), 0)[-1]
    with pytest.raises(Exception, match="numbered from 1 to"):
        client.predict(BASE, BASE, 10_000, api_name="/held_out")
