"""The chat through the served page: an empty runs folder, two visitors, stopping, many questions, errors, hostile text."""

import html
import re
import shutil
import time

import pytest
import safetensors.torch
from conftest import fill_lora

pytest.importorskip("gradio")

from gradio_client import Client  # noqa: E402
from test_ui_chat import CHECKPOINT, HOSTILE, make_run  # noqa: E402
from test_ui_worker import PERTURBED, QUESTION, rollout_texts  # noqa: E402
from watching import by_name, call  # noqa: E402

from rl.config import Config  # noqa: E402
from rl.model.lora import save_adapter  # noqa: E402
from rl.model.policy import load_policy  # noqa: E402
from ui import app, chat_page, questions_page  # noqa: E402
from ui.chat import BASE, COMPARE, GREEDY, SAMPLING  # noqa: E402
from ui.text import to_markdown  # noqa: E402


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Serve the page without runs. Yield a function that makes clients, the runs folder, a policy, its base answer."""
    folder = tmp_path_factory.mktemp("served") / "runs"
    views = {}
    with pytest.MonkeyPatch.context() as patch:
        for module in (chat_page, questions_page):
            build = module.build
            patch.setattr(module, "build", lambda page, m=module, b=build: views.setdefault(m, b(page)))
        blocks, url = app.launch(app.Settings(runs=folder, port=0))
    policy = load_policy(Config(device="cpu"))
    with policy.reference():
        text = rollout_texts(policy, max_tokens=90)[0]

    def connect(module=chat_page):
        client = Client(url, verbose=False)
        client.view = views[module]
        return client

    yield connect, folder, policy, text
    blocks.close()


@pytest.fixture
def run(served):
    """Make a run whose LoRA answers differently. Yield its folder and its answer."""
    _, folder, policy, base = served
    fill_lora(policy, PERTURBED)
    save_adapter(policy, make_run(folder) / "checkpoints/step_000001")
    lora_answer = rollout_texts(policy, max_tokens=90)[0]
    assert lora_answer != base
    yield folder / "one", lora_answer
    shutil.rmtree(folder / "one")


def submit(client, question, left=BASE, right=BASE, expected="", decoding=GREEDY, samples=1, temperature=1.0, **more):
    """Ask a question, and return the job that answers it."""
    max_tokens = more.get("max_tokens", 90)
    settings = COMPARE, left, right, decoding, samples, temperature, 1.0, 0, max_tokens, ""
    return client.submit(question, expected, *settings, api_name="/ask")


def result(client, job, seconds=60):
    return by_name(client, job.result(seconds))


def answer(client, question, **options):
    return result(client, submit(client, question, **options))


def chat_texts(values, side):
    return [m["content"][0]["text"] for m in values[f"{side}_chat"] if not (m["metadata"] or {}).get("title")]


def titles(values, side):
    return [html.unescape(m["metadata"]["title"]) for m in values[f"{side}_chat"] if (m["metadata"] or {}).get("title")]


def test_first_run_in_an_empty_folder(served):
    connect, folder, policy, base = served
    client = connect()
    assert not folder.exists()
    values = answer(client, QUESTION, expected="13")
    assert chat_texts(values, "left")[1:] == chat_texts(values, "right")[1:] == [to_markdown(base)]
    assert titles(values, "left")[0].startswith("wrong (expected 13) · reward 0.1")
    fill_lora(policy, PERTURBED)
    save_adapter(policy, make_run(folder) / "checkpoints/step_000001")
    values = call(client, "/load_question", COMPARE, BASE, CHECKPOINT, 1)
    assert (values["question"], values["number"]) == (QUESTION, 1)
    values = answer(client, QUESTION, right=CHECKPOINT)
    assert chat_texts(values, "left")[-1] == to_markdown(base)
    assert chat_texts(values, "right")[-1] == to_markdown(rollout_texts(policy, max_tokens=90)[0])
    for value, message in (("../../etc/passwd", "no run"), ("one/../../x", "has no checkpoint"), (7, "no run")):
        if message == "no run":
            assert message in answer(client, QUESTION, right=value)["status"]
        else:
            assert message in chat_texts(answer(client, QUESTION, right=value), "right")[-1]
    shutil.rmtree(folder / "one")


def test_next_question_is_answered_after_stop(served):
    connect, _, _, base = served
    first, second = connect(), connect()
    for _ in range(2):
        job = submit(first, QUESTION, decoding=SAMPLING, temperature=2.0, max_tokens=450, samples=16)
        while len(job.outputs()) < 1 and not job.done():
            time.sleep(0.01)
        for _ in range(3):
            first.predict(api_name="/stop")
        assert "Stopped after" in result(first, job, 20)["status"]
    values = answer(second, QUESTION)  # without traces of the other visitor
    assert chat_texts(values, "left")[-1] == to_markdown(base) and len(chat_texts(values, "left")) == 2
    first.predict(api_name="/new_chat")
    assert chat_texts(answer(first, QUESTION), "left")[-1] == to_markdown(base)


def test_cancelled_and_abandoned_questions(served):
    """If the client cancels the event or disconnects, the next question is answered within seconds."""
    connect, _, _, base = served
    for leave in (lambda _, job: [job.cancel() for _ in range(3)], lambda client, _: client.close()):
        client = connect()
        job = submit(client, QUESTION, decoding=SAMPLING, temperature=2.0, max_tokens=450, samples=16)
        while len(job.outputs()) < 1 and not job.done():
            time.sleep(0.01)
        leave(client, job)
        other = connect()
        assert chat_texts(result(other, submit(other, QUESTION), 20), "left")[-1] == to_markdown(base)


def test_errors_are_in_the_status_line(served):
    """No error is raised, which would cover the chats."""
    connect, _, _, base = served
    client = connect()
    assert "no question" in answer(client, "")["status"]
    assert "'one'" in answer(client, "What?", right=CHECKPOINT)["status"]
    values = answer(client, "1 + " * 300)
    assert "context length of the model is 512" in html.unescape(chat_texts(values, "left")[-1])
    assert values["status"].startswith("Failed after")
    assert chat_texts(answer(client, QUESTION), "left")[-1] == to_markdown(base), "the failed one is not sent again"
    assert "Maximum answer length" in answer(client, QUESTION, max_tokens=-1)["status"]
    assert "from 1 to" in call(client, "/load_question", COMPARE, BASE, BASE, 10_000)["status"]


def test_two_visitors(served, run):
    """One visitor is answered after the other, each with the models of their sides."""
    connect, _, _, base = served
    clients = [connect(), connect()]
    jobs = [submit(client, QUESTION, right=CHECKPOINT) for client in clients]
    for client, job in zip(clients, jobs):
        values = result(client, job)
        assert chat_texts(values, "left")[-1] == to_markdown(base)
        assert chat_texts(values, "right")[-1] == to_markdown(run[1])


@pytest.mark.slow
def test_broken_and_mismatched_adapters(served, run):
    connect, _, _, base = served
    weights = run[0] / "checkpoints/step_000001/adapter_model.safetensors"
    content = weights.read_bytes()
    client = connect()

    def right_note():
        values = answer(client, QUESTION, right=CHECKPOINT)
        assert chat_texts(values, "left")[-1] == to_markdown(base)
        return html.unescape(chat_texts(values, "right")[-1])

    weights.write_bytes(content[:5000])
    assert "step_000001 does not fit data/tiny" in right_note()
    weights.unlink()
    assert "has no adapter_model.safetensors" in right_note()
    tensors = {name: tensor[..., :4].contiguous() for name, tensor in safetensors.torch.load(content).items()}
    safetensors.torch.save_file(tensors, weights)  # like the adapter of a narrower model
    assert "does not fit data/tiny: " in right_note()
    weights.write_bytes(content)
    assert chat_texts(answer(client, QUESTION, right=CHECKPOINT), "right")[-1] == to_markdown(run[1])


@pytest.mark.slow
def test_reward_files_that_fail(served, run):
    """The answers are shown, with the error in place of a verdict."""
    connect, _, _, base = served
    client = connect()
    for source, message in (
        ("from grading import reward\n@reward\ndef bad(c):\n    return c.nothing\n", "'bad' (rewards.py:4)"),
        ("def bad(:\n", "rewards.py:1: SyntaxError"),
        ("import missing_module\n", "rewards.py:1: ModuleNotFoundError"),
        ("x = 1\n", "rewards.py"),
    ):
        (run[0] / "rewards.py").write_text(source)
        values = answer(client, QUESTION, right=CHECKPOINT, expected="13")
        assert chat_texts(values, "left")[-1] == to_markdown(base)
        assert "No verdict: " in values["status"] and message in values["status"]


def test_stop_ends_endless_reward_functions(served, run):
    (run[0] / "rewards.py").write_text("from grading import reward\n@reward\ndef endless(c):\n    while True: pass\n")
    client = served[0]()
    job = submit(client, QUESTION, right=CHECKPOINT, expected="13")
    while not any("Scoring" in by_name(client, outputs).get("status", "") for outputs in job.outputs()):
        time.sleep(0.05)
    client.predict(api_name="/stop")
    assert "No verdict: stopped" in result(client, job, 5)["status"]


def test_many_questions_at_once(served, run):
    """The answers of the base model and of the checkpoint, with the paired gain."""
    client = served[0](questions_page)
    values = call(client, "/ask_many", BASE, CHECKPOINT, 8)
    lines = values["summary"].splitlines()
    assert lines[0].startswith("the base model: ") and lines[1].startswith("one, step 1: ") and "/8 correct" in lines[1]
    assert lines[2].startswith("Gain: ") and "points (95% CI" in lines[2] and "questions fixed" in lines[2]
    assert len(values["table"]["data"]) == 8 and values["status"] == "8 held-out questions, greedy."
    values = call(client, "/ask_many", BASE, "one/step_000009", 8)
    assert "Right: one has no checkpoint" in values["status"] and values["table"]["data"] == []


@pytest.mark.parametrize("text", [HOSTILE, "$$\\href{javascript:alert(1)}{x}$$", "\0\u202e" + "x" * 50_000])
def test_hostile_text_is_shown_as_text(served, run, text):
    """Hostile text as a question, as the expected answer, and as the reason of a reward function."""
    (run[0] / "rewards.py").write_text(
        f"from grading import reward\n@reward\ndef reason(c):\n    return 0.5, {text!r}\n", encoding="utf-8"
    )
    client = served[0]()
    values = answer(client, text, right=CHECKPOINT, expected=text)
    shown = [values["left_chat"], values["right_chat"], titles(values, "left") and values["left_chat"][-1]["metadata"]]
    raw = re.sub(
        r"(`{3,})text.*?\1", "", str(shown), flags=re.DOTALL
    )  # code, such as the prompt, is escaped in the browser
    assert not any(tag in raw for tag in ("<script", "<img", "<b>", "<!--", "<think"))
    assert max(len(m["content"][0]["text"]) for m in values["left_chat"]) < 50_000
