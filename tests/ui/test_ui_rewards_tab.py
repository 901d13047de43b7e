"""The Rewards tab: scoring, rescoring, the editor, reward files that fail, and the read-only page."""

import json
import os
import re
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import gradio as gr
import pytest
import yaml
from conftest import run_with_questions
from watching import write_rollouts

from ui import learn_tab, rewards_tab
from ui.runs import Page, Runs, UiError

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
A, B = SimpleNamespace(session_hash="a"), SimpleNamespace(session_hash="b")  # requests of two windows
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
    return rewards_tab.score(page, *inputs, row_text, text, fields["truncated"], source)


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
    message, table, question, row_text, text, truncated = rewards_tab.pick(page, "mine", 3, 2)
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
    _, _, question, row_text, text, _ = rewards_tab.pick(page, "mine", 3, 4)
    assert len(text) < 21_000 and "more characters are not shown" in text and SCRIPT not in text
    message, table = score(page, text, row_text, name="mine", step=3, number=4, question=question)
    assert cells(table)["correct"][-1] == "wrong: 7 is not 2"


def test_names_a_missing_run_step_completion_or_data_file(page):
    for place, expected in (
        (("mine", 3, 5), "completions 1 to 4"),
        (("mine", 9, 1), "no completions for step 9"),
        (("../mine", 3, 1), "There is no run"),
        ((None, None, None), "There is no run"),
    ):
        with pytest.raises(UiError, match=expected):
            rewards_tab.pick(page, *place)
    (page.runs.folder.parent / "q.jsonl").unlink()
    message, _, _, row_text, text, _ = rewards_tab.pick(page, "mine", 3, 1)
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
    monkeypatch.setattr(rewards_tab, "TIME_LIMIT", 1.0)
    start = time.monotonic()
    message, table = score(page, "x", source=f"{REWARDS}@reward\ndef endless(c):\n    {loop}\n")
    assert time.monotonic() - start < 10
    assert "within 1 s" in message and "in endless, line 16" in message and table == []


def test_kills_the_processes_of_a_function_that_hangs(page, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards_tab, "TIME_LIMIT", 2.0)
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
    message, table = rewards_tab.rescore(page, "mine", 3, REWARDS)
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
    message, table = rewards_tab.rescore(page, "mine", 3, REWARDS.replace('"math"', '"math", weight=9'))
    assert "2.0000      1.0500" in message, "the weight of the run applies"
    message, table = rewards_tab.rescore(page, "mine", 3, REWARDS + "1 / 0\n")
    assert "ZeroDivisionError" in message and table == []


def test_skips_completions_whose_question_is_missing(page):
    rollouts = page.runs.get("mine").path / "rollouts/000003.jsonl"
    rollouts.write_text(rollouts.read_text().replace('"q0"', '"missing"'))
    message, table = rewards_tab.rescore(page, "mine", 3, REWARDS)
    assert "2 skipped" in message and [row[0] for row in table] == [4, 3]
    assert "no longer in the run's data" in rewards_tab.pick(page, "mine", 3, 1)[0]


# --- the editor


def test_saves_the_file_and_keeps_edits_with_errors_in_the_draft(page):
    file, draft = rewards_tab.file_and_draft(page)
    os.chmod(file, 0o640)
    _, source, loaded = rewards_tab.read_file(page, A)
    assert source == loaded == REWARDS and "nothing to save" in rewards_tab.save(page, source.strip(), loaded, A)[0]
    message, loaded = rewards_tab.save(page, REWARDS + "def broken(:", loaded, A)
    assert "Not saved: rewards.py:14: SyntaxError" in message and file.read_text() == loaded == REWARDS
    message, source, loaded = rewards_tab.read_file(page, A)  # a later visit
    assert "unsaved edits of rewards.py" in message and source == REWARDS + "def broken(:\n"
    assert loaded == REWARDS
    better = REWARDS.replace("<= 3", "<= 4")
    message, loaded = rewards_tab.save(page, better, loaded, A)
    assert message.startswith("Saved. Rewards: correct 1, short 0.2.") and file.read_text() == loaded == better
    assert stat.S_IMODE(file.stat().st_mode) == 0o640 and not draft.exists()
    assert sorted(f.name for f in file.parent.iterdir()) == ["q.jsonl", "rewards.py", "runs"]


def test_does_not_overwrite_a_file_that_changed_on_disk(page):
    file, draft = rewards_tab.file_and_draft(page)
    file.write_text(REWARDS + "# by another editor\n")
    message, _ = rewards_tab.save(page, REWARDS + "# mine\n", REWARDS, A)
    assert "may have changed on disk" in message and "another" in file.read_text() and "mine" in draft.read_text()
    message, source, loaded = rewards_tab.reload_file(page, A)
    assert source == loaded == file.read_text() and not draft.exists()
    message, loaded = rewards_tab.save(page, REWARDS + "# mine\n", None, A)  # the page lost the text that it read
    assert "may have changed" in message
    assert rewards_tab.save(page, REWARDS + "# mine\n", loaded, A)[0].startswith("Saved")


def test_scores_with_unsaved_edits_and_keeps_them_in_the_draft(page):
    file, draft = rewards_tab.file_and_draft(page)
    message, _ = score(page, "\\boxed{2}", "2", source=REWARDS.replace("weight=0.2", "weight=0.25"))
    assert "rewards.py with unsaved edits: total" in message and file.read_text() == REWARDS
    assert "Scored with rewards.py: total" in score(page, "\\boxed{2}", "2")[0]
    rewards_tab.save_draft(page, REWARDS + "# mine", A)  # while the user types
    assert draft.read_text() == REWARDS + "# mine\n" == rewards_tab.read_file(page, A)[1]
    rewards_tab.save_draft(page, REWARDS, A)
    assert not draft.exists(), "the text equals the file again"


def test_keeps_the_edits_of_another_window(page):
    file, draft = rewards_tab.file_and_draft(page)
    rewards_tab.read_file(page, A), rewards_tab.read_file(page, B)
    assert "kept in rewards.draft.py" in rewards_tab.save_draft(page, REWARDS + "# of A", A)
    assert "nothing to save" in rewards_tab.save(page, REWARDS, REWARDS, B)[0]
    for source in (REWARDS, REWARDS + "# of B"):
        assert "edits from another window" in rewards_tab.save_draft(page, source, B)
    message, loaded = rewards_tab.save(page, REWARDS + "# of B", REWARDS, B)
    assert message.startswith("Saved") and "of B" in file.read_text() and "of A" in draft.read_text()
    assert rewards_tab.read_file(page, B)[1] == REWARDS + "# of A\n", "this window continues with them"
    assert "another window" in rewards_tab.save_draft(page, REWARDS + "# of A, more", A)


def test_keeps_edits_that_are_made_during_a_save(page):
    file, draft = rewards_tab.file_and_draft(page)
    slow = REWARDS + "import time; time.sleep(1.5)\n"
    rewards_tab.read_file(page, A)
    with ThreadPoolExecutor() as threads:
        future = threads.submit(rewards_tab.save, page, slow, REWARDS, A)
        time.sleep(0.7)
        rewards_tab.save_draft(page, slow + "# edited meanwhile", A)
        assert future.result()[0].startswith("Saved")
        assert file.read_text() == slow and draft.read_text() == slow + "# edited meanwhile\n"
        list(threads.map(lambda n: [rewards_tab.save_draft(page, f"{REWARDS}# {n}", A) for _ in range(100)], range(4)))
    assert re.fullmatch(re.escape(REWARDS) + r"# \d\n", draft.read_text())


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
    monkeypatch.setattr("ui.reward_process.Popen", None)
    message, table, _, _, text, _ = rewards_tab.pick(page, "mine", 3, 2)  # as logged by the run
    assert "total 2, right" in message and text == "\\boxed{2}"
    endpoints = {f.api_name for f in build(page).fns.values()}
    assert endpoints == {"choose", "pick", "gae", "clip"}


# --- the page


def build(page):
    with gr.Blocks(analytics_enabled=False) as blocks:
        rewards_tab.build(page)
        learn_tab.build(page)
    return blocks


def test_imports_no_heavy_packages():
    code = "import sys; from ui import reward_process; print({'gradio', 'pandas'} & set(sys.modules))\n"
    code += "from ui import rewards_tab; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["set()", "set()"], result.stderr


def test_serves_the_endpoints_over_http(page, monkeypatch):
    gradio_client = pytest.importorskip("gradio_client")
    blocks = build(page)
    _, url, _ = blocks.queue().launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        client = gradio_client.Client(url, verbose=False)
        run, step, number = client.predict(None, None, 1, api_name="/choose")
        assert run["choices"] == [["mine", "mine"]] and (run["value"], step["value"], number) == ("mine", 3, 1)
        message, table, *fields = client.predict("mine", 3, 2, api_name="/pick")
        assert message == "In the run: total 2, right." and fields[2] == "\\boxed{2}"
        message, table = client.predict("mine", 3, 2, *fields, REWARDS, api_name="/score")
        assert "total 0.2, wrong" in message and table["data"][0][0] == "correct"
        message, _ = client.predict("mine", 3, REWARDS, api_name="/rescore")
        assert "verdicts: 2 right -> wrong" in message
        monkeypatch.setattr(rewards_tab, "TIME_LIMIT", 3.0)
        endless = REWARDS + "@reward\ndef endless(c):\n    while True: pass\n"
        job = client.submit("mine", 3, 2, *fields, endless, api_name="/score")
        assert "above 1.28" in client.predict(1.5, 1, 0.2, 0.28, api_name="/clip")[0]
        assert not job.done(), "a function that hangs does not hold up the page"
        assert "in endless" in job.result()[0]
        episode = {"headers": ["token", "reward", "value"], "data": [["a", "0", 0.5], ["b", 1, 0.25]]}
        message, table, curves, _ = client.predict(episode, 1.0, 0.5, 0.0, api_name="/gae")
        assert table["data"][0][2] == 0.125 and curves["columns"] == ["x", "y", "series"]
        with pytest.raises(Exception, match="no completions for step 9"):
            client.predict("mine", 9, 2, api_name="/pick")
    finally:
        blocks.close()
