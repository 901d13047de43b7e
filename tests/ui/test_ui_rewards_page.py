"""The Rewards page: scoring, rescoring, the editor, reward files that fail, and the read-only page."""

import json
import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import gradio as gr
import pytest
import yaml
from conftest import run_with_questions
from watching import write_rollouts

from grading import RewardError
from rl.config import RunError
from rl.run.reader import Runs
from ui import rewards_page
from ui.page import Page, UiError

REWARDS = """
from grading import grade_math, metric, reward

@reward(when="math")
def correct(completion):
    return grade_math(completion.answer, completion.row["answer"])

@reward(weight=0.2)
def short(completion):
    return completion.tokens <= 3, f"{completion.tokens} tokens"

@metric
def thinks(completion):
    return bool(completion.thinking)
""".lstrip()
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def page(tmp_path):
    """A run with one step of four completions to two questions, whose reward function accepted every answer."""
    questions, rows, folder = run_with_questions(tmp_path)
    settings = {
        "train_data": [str(questions)],
        "train_questions": 100,
        "eval_questions": 1,
        "num_generations": 2,
        "reward_weights": {"correct": 2.0},
    }
    defaults = {"eval_data": [], "columns": {}, "seed": 0, "reward_funcs": []}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | defaults))
    lines = [
        {
            "step": 3,
            "prompt_id": row["id"],
            "task": "t",
            "prompt": row["prompt"],
            "completion": text,
            "finish_reason": "stop",
            "tokens": tokens,
            "reward": 2.0,
            "rewards": {"correct": 1.0},
            "metrics": {},
            "verdict": "right",
            "reasons": {"correct": "right"},
            "advantage": 0.0,
        }
        for row, text, tokens in (
            (rows[0], "\\boxed{1}", 9),
            (rows[0], "\\boxed{2}", 3),
            (rows[1], "\\boxed{2}", 9),
            (rows[1], "x" * 50_000 + SCRIPT + "\\boxed{7}", 9),
        )
    ]
    write_rollouts(folder, lines)
    (folder / "rewards.py").write_text("from grading import reward\n@reward\ndef correct(completion):\n    return 1\n")
    (tmp_path / "rewards.py").write_text(REWARDS)
    return Page(Runs(tmp_path / "runs"), None, True, tmp_path / "rewards.py")


def score(page, text, row_text="", source=REWARDS, **fields):
    fields = {"name": None, "step": None, "number": None, "question": "1 + 1?", "truncated": False} | fields
    inputs = (fields[name] for name in ("name", "step", "number", "question"))
    return last(rewards_page.score(page, *inputs, row_text, text, fields["truncated"], source), "message", "scores")


def last(updates, *names):
    """Return the last values of a handler. An error takes the place of the first one, as in the status line."""
    values = {}
    try:
        *_, values = updates
    except RewardError as error:
        return str(error), []
    return tuple(values[name] for name in names)


def rescore(page, name, step, source):
    return last(rewards_page.rescore(page, name, step, source), "report", "changes")


def save(page, source, loaded):
    """Press Save. Returns the message and the new value of `loaded`."""
    try:
        *_, values = rewards_page.save(page, source, loaded)
    except RewardError as error:
        return str(error), loaded
    return values["file_status"], values.get("loaded", loaded)


def pick(page, *place):
    values = rewards_page.pick(page, *place)
    return [values[name] for name in ("message", "scores", "question", "row_text", "text", "truncated")]


def cells(table):
    return {row[0]: row[1:] for row in table}


# --- one completion


def test_scores_a_pasted_completion(page):
    message, table = score(page, "<think>1+1=2</think>\\boxed{2}", "2")
    assert message.startswith("Scored with rewards.py: total 1, right (judged by correct).")
    assert cells(table) == {
        "correct": ["1", "1", "1", "right"],
        "short": ["0", "0.2", "0", "29 tokens"],  # its bytes, as no model wrote it
        "thinks": ["1", "metric", "", ""],
    }
    message, table = score(page, "\\boxed{3}", '{"answer": 2, "level": 1}')
    assert "total 0, wrong (judged by correct)" in message and cells(table)["correct"][-1] == "wrong: 3 is not 2"
    message, table = score(page, "\\boxed{3}")
    assert "no verdict" in message and "expected answer" in message and cells(table)["correct"][0] == "-"
    with pytest.raises(UiError, match="not valid JSON"):
        score(page, "x", '{"answer": 2,}')
    assert "right" in score(page, "\\boxed{\\{1,2\\}}", "{1, 2}")[0]  # a set is not a row


def test_loads_a_completion_of_a_run_and_scores_it_with_the_weights_of_the_run(page):
    message, table, question, row_text, text, truncated = pick(page, "mine", 3, 2)
    assert message == "In the run: total 2, right." and cells(table)["correct"] == ["1", "", "", "right"]
    assert (question, text, truncated) == ("0 + 1?", "\\boxed{2}", False) and json.loads(row_text)["answer"] == "1"
    place = {"name": "mine", "step": 3, "number": 2, "question": question}
    message, table = score(page, text, row_text, **place)
    assert message.startswith(
        "Scored with rewards.py: total 0.2, wrong (judged by correct). In the run: total 2, right."
    )
    assert cells(table)["correct"][1] == "2", "the weight of the run"
    assert cells(table)["short"] == ["1", "0.2", "0.2", "3 tokens"], "the number of tokens in the run"


def test_cuts_a_very_long_completion_for_display_only(page):
    _, _, question, row_text, text, _ = pick(page, "mine", 3, 4)
    assert len(text) < 21_000 and "more characters are not shown" in text and SCRIPT not in text
    message, table = score(page, text, row_text, name="mine", step=3, number=4, question=question)
    assert cells(table)["correct"][-1] == "wrong: 7 is not 2"


def test_names_a_missing_run_step_completion_or_data_file(page):
    for place, expected in (
        (("mine", 3, 5), "completions 1 to 4"),
        (("mine", 9, 1), "no completions for step 9"),
        (("../mine", 3, 1), "There is no run"),
        ((None, None, None), "No run is selected"),
    ):
        with pytest.raises((UiError, RunError), match=expected):
            pick(page, *place)
    (page.runs.folder.parent / "q.jsonl").unlink()
    message, _, _, row_text, text, _ = pick(page, "mine", 3, 1)
    assert "q.jsonl" in message and row_text == "" and text == "\\boxed{1}"


# --- reward files that fail


@pytest.mark.parametrize(
    "more, expected",
    [
        ("def broken(:\n", "rewards.py:14: SyntaxError"),
        ("1 / 0\n", "rewards.py:14: ZeroDivisionError"),
        ("@reward\ndef fails(c):\n    return 1 / 0\n", "'fails' (rewards.py:16), row pasted: ZeroDivisionError"),
        ("@reward\ndef odd(c):\n    return 'x'\n", "'odd' (rewards.py:14), row pasted: returned 'x'"),
        ("import os\nos._exit(7)\n", "status 7"),
        ("raise SystemExit('enough')\n", "enough"),
    ],
)
def test_names_the_line_of_an_error(page, more, expected):
    message, table = score(page, "\\boxed{2}", "2", source=REWARDS + more)
    assert expected in message and table == []


@pytest.mark.parametrize("loop", ["while True: print('<b>on and on</b>' * 99)", "import time; time.sleep(99)"])
def test_stops_and_names_a_function_that_hangs(page, loop, monkeypatch):
    monkeypatch.setattr(rewards_page, "TIME_LIMIT", 1.0)
    start = time.monotonic()
    message, table = score(page, "x", source=f"{REWARDS}@reward\ndef endless(c):\n    {loop}\n")
    assert time.monotonic() - start < 10
    assert "within 1 s" in message and "in endless, line 16" in message and table == []


def test_kills_the_processes_of_a_function_that_hangs(page, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards_page, "TIME_LIMIT", 2.0)
    pid = tmp_path / "pid"
    more = f"""
import subprocess
@reward
def starts(c):
    child = subprocess.Popen(["sleep", "60"])
    open({str(pid)!r}, "w").write(str(child.pid))
    child.wait()
"""
    assert "within 2 s" in score(page, "x", source=REWARDS + more)[0]
    time.sleep(0.3)
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid.read_text()], capture_output=True, text=True).stdout.strip()
    assert state == "" or state.startswith("Z")


def test_shows_printed_html_and_html_reasons_as_text(page):
    more = f"@reward\ndef loud(c):\n    print({SCRIPT!r})\n    return 1, {SCRIPT!r}\n"
    message, table = score(page, SCRIPT + "\\boxed{2}", "2", source=REWARDS + more)
    assert message.endswith(f"Output: {SCRIPT}") and cells(table)["loud"][-1] == SCRIPT
    blocks = build(page)
    for kind in (gr.HTML, gr.Chatbot):
        assert not [c for c in blocks.blocks.values() if isinstance(c, kind)]
    for table in (c for c in blocks.blocks.values() if isinstance(c, gr.Dataframe)):
        assert not {"markdown", "html"} & set([table.datatype] if isinstance(table.datatype, str) else table.datatype)
    outputs = {id(out) for f in blocks.fns.values() for out in f.outputs}
    assert not [c for c in blocks.blocks.values() if isinstance(c, gr.Markdown) and id(c) in outputs]


# --- rescoring a step


def test_rescores_a_step(page):
    message, table = rescore(page, "mine", 3, REWARDS)
    assert message.startswith("4 completions of step 3, scored with rewards.py:")
    figures = {line.split()[0]: line.split()[1:] for line in message.splitlines() if line.startswith("  ")}
    assert figures["correct"] == ["1.0000", "0.5000", "2"]
    assert figures["short"] == ["-", "0.2500", "4"]
    assert figures["total"] == ["2.0000", "1.0500", "2"]  # (2 + 0.2 + 2 + 0) / 4
    assert figures["verdicts:"] == ["2", "right", "->", "wrong"]
    assert [row[0] for row in table] == [4, 2, 1, 3], "the largest change comes first"
    assert table[1][2:7] == [
        "2",
        "0.2",
        "right -> wrong",
        "correct 1 -> 0; short - -> 1",
        "wrong: 2 is not 1; 3 tokens",
    ]
    assert table[2][2:5] == ["2", "2", "right"]
    assert SCRIPT in table[0][7] and len(table[0][7]) == 80
    message, table = rescore(page, "mine", 3, REWARDS.replace('"math"', '"math", weight=9'))
    assert "2.0000      1.0500" in message, "the weight of the run applies"
    message, table = rescore(page, "mine", 3, REWARDS + "1 / 0\n")
    assert "ZeroDivisionError" in message and table == []


def test_skips_completions_whose_question_is_missing(page):
    rollouts = page.runs.get("mine").path / "rollouts/000003.jsonl"
    rollouts.write_text(rollouts.read_text().replace('"q0"', '"missing"'))
    message, table = rescore(page, "mine", 3, REWARDS)
    assert "2 skipped" in message and [row[0] for row in table] == [4, 3]
    assert "no longer in the run's data" in pick(page, "mine", 3, 1)[0]


# --- the editor


def test_saves_the_file(page):
    file = page.rewards_file
    os.chmod(file, 0o640)
    values = rewards_page.read_file(page, None)
    assert values["source"] == values["loaded"] == REWARDS and "Editing" in values["file_status"]
    loaded = values["loaded"]
    assert "nothing to save" in save(page, REWARDS.strip(), loaded)[0]
    message, loaded = save(page, REWARDS + "def broken(:", loaded)
    assert "rewards.py:14: SyntaxError" in message and file.read_text() == loaded == REWARDS, "it is not saved"
    better = REWARDS.replace("<= 3", "<= 4")
    message, loaded = save(page, better, loaded)
    assert message.startswith("Saved. Rewards: correct 1, short 0.2.") and file.read_text() == loaded == better
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert sorted(f.name for f in file.parent.iterdir()) == ["q.jsonl", "rewards.py", "runs"]


def test_does_not_overwrite_a_file_that_changed_on_disk(page):
    file = page.rewards_file
    file.write_text(REWARDS + "# by another editor\n")
    message, loaded = save(page, REWARDS + "# mine\n", REWARDS)
    assert "may have changed on disk" in message and "another" in file.read_text()
    assert save(page, REWARDS + "# mine\n", loaded)[0].startswith("Saved")
    message, loaded = save(page, REWARDS + "# more\n", None)  # the page lost the text that it read
    assert "may have changed" in message and "more" not in file.read_text()


def test_the_browser_keeps_unsaved_edits(page):
    draft = rewards_page.keep_draft(REWARDS + "def broken(:")["draft"]
    values = rewards_page.read_file(page, draft)  # after a reload
    assert values["source"] == draft and values["loaded"] == REWARDS and "unsaved edits" in values["file_status"]
    values = rewards_page.discard_edits(page)
    assert values["source"] == REWARDS and values["draft"] is None
    assert rewards_page.read_file(page, REWARDS.strip())["file_status"].startswith("Editing"), "they equal the file"
    save(page, draft := REWARDS + "# mine", REWARDS)
    assert rewards_page.read_file(page, draft)["file_status"].startswith("Editing"), "it is saved"


def test_scores_with_unsaved_edits(page):
    message, _ = score(page, "\\boxed{2}", "2", source=REWARDS.replace("weight=0.2", "weight=0.25"))
    assert "rewards.py with unsaved edits: total" in message and page.rewards_file.read_text() == REWARDS
    assert "Scored with rewards.py: total" in score(page, "\\boxed{2}", "2")[0]


def test_a_looping_function_can_be_stopped(page):
    """Gradio closes the handler when Stop is pressed. The process ends at once."""
    endless = REWARDS + "@reward\ndef endless(c):\n    while True: pass\n"
    updates = rewards_page.score(page, None, None, None, "?", "1", "x", False, endless)
    assert next(updates)["status"].startswith("Scoring")
    start = time.monotonic()
    updates.close()
    assert time.monotonic() - start < 3
    blocks = build(page)
    (stop,) = (f for f in blocks.fns.values() if f.cancels)
    assert {blocks.fns[i].api_name for i in stop.cancels} == {"score", "rescore", "save"}


def test_opens_on_the_newest_run_when_it_is_opened(page):
    """Not on the run that was the newest when the server started."""
    assert rewards_page.load(page)["run"].value == "mine"
    newer = page.runs.folder / "newer"
    newer.mkdir()
    (newer / "config.yaml").write_text("")
    os.utime(newer / "config.yaml", (2**32, 2**32))
    assert rewards_page.load(page)["run"].value == "newer"
    values = rewards_page.choose_run(page, "mine")
    assert values["step"].value == 3 and values["step"].label == "Step (3 to 3)" and values["number"] == 1
    assert rewards_page.choose_run(page, "newer")["step"].value is None
    assert rewards_page.choose_run(page, None)["number"] == 1


def test_a_reward_file_can_read_files_beside_it(page):
    (page.rewards_file.parent / "words.txt").write_text("one two")
    more = "from pathlib import Path\nW = (Path(__file__).parent / 'words.txt').read_text().split()\n"
    message, table = score(page, "x", source=REWARDS + more + "@reward\ndef known(c):\n    return len(W)\n")
    assert cells(table)["known"][0] == "2", message


def test_windows_score_concurrently_with_their_own_sources(page):
    sources = [REWARDS + f"@reward\ndef number(c):\n    return {n}\n" for n in range(4)]
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(lambda source: score(page, "x", source=source), sources))
    assert [cells(table)["number"][0] for _, table in results] == ["0", "1", "2", "3"]


def test_an_invalid_row_is_not_reported_as_an_error_of_the_file(page):
    message, table = score(page, "x", '{"prompt": 5, "answer": "4"}')
    assert message.startswith("Invalid row or settings: TypeError") and table == []


def test_a_page_for_other_machines_neither_writes_nor_runs_code(page, monkeypatch):
    page.editable = False
    monkeypatch.setattr("tools.reward_process.Popen", None)
    message, table, _, _, text, _ = pick(page, "mine", 3, 2)  # as logged by the run
    assert "total 2, right" in message and text == "\\boxed{2}"
    endpoints = {f.api_name for f in build(page).fns.values()}
    assert endpoints == {"load", "choose_run", "choose_run_1", "pick"}


# --- the page


def build(page):
    with gr.Blocks(analytics_enabled=False) as blocks:
        rewards_page.build(page)
    return blocks


def test_imports_no_heavy_packages():
    code = "import sys; from tools import reward_process; print({'gradio', 'pandas'} & set(sys.modules))\n"
    code += "from ui import rewards_page; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["set()", "set()"], result.stderr


@pytest.mark.slow
def test_serves_the_endpoints_over_http(page, monkeypatch):
    from watching import by_name, call

    gradio_client = pytest.importorskip("gradio_client")
    with gr.Blocks(analytics_enabled=False) as blocks:
        view = rewards_page.build(page)
    _, url, _ = blocks.queue().launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        client = gradio_client.Client(url, verbose=False)
        client.view = view
        assert call(client, "/load")["run"]["value"] == "mine"
        values = call(client, "/pick", "mine", 3, 2)
        assert values["message"] == "In the run: total 2, right." and values["text"] == "\\boxed{2}"
        fields = [values[name] for name in ("question", "row_text", "text", "truncated")]
        values = call(client, "/score", "mine", 3, 2, *fields, REWARDS)
        assert "total 0.2, wrong" in values["message"] and values["scores"]["data"][0][0] == "correct"
        assert "verdicts: 2 right -> wrong" in call(client, "/rescore", "mine", 3, REWARDS)["report"]
        monkeypatch.setattr(rewards_page, "TIME_LIMIT", 3.0)
        endless = REWARDS + "@reward\ndef endless(c):\n    while True: pass\n"
        job = client.submit("mine", 3, 2, *fields, endless, api_name="/score")
        assert "no completions for step 9" in call(client, "/pick", "mine", 9, 2)["status"]
        assert not job.done(), "a function that hangs does not hold up the page"
        assert "in endless" in by_name(client, job.result())["status"]
    finally:
        blocks.close()
