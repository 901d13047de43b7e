"""The tab Rewards: what its buttons answer, files that do not work, and what a page for others refuses."""

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
from conftest import asked_in_a_run
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
A, B = SimpleNamespace(session_hash="a"), SimpleNamespace(session_hash="b")  # two windows
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def page(tmp_path):
    """A run of one step on three questions, four completions; its reward was lax: it paid for any box."""
    questions, rows, folder = asked_in_a_run(tmp_path)
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


def score(page, text, given="", source=REWARDS, **asked):
    asked = {"name": None, "step": None, "number": None, "question": "1 + 1?", "cut": False} | asked
    places = (asked[name] for name in ("name", "step", "number", "question"))
    return rewards_tab.score(page, *places, given, text, asked["cut"], source)


def cells(table):
    return {row[0]: row[1:] for row in table}


# --- one completion


def test_a_pasted_completion_is_scored_with_weights_total_and_verdict(page):
    words, table = score(page, "<think>1+1=2</think>\\boxed{2}", "2")
    assert words.startswith("By rewards.py: total 1, right (by correct).")
    assert cells(table) == {
        "correct": ["1", "1", "1", "right"],
        "short": ["0", "0.2", "0", "29 tokens"],  # what no model wrote: its bytes
        "thinks": ["1", "metric", "", ""],
    }
    words, table = score(page, "\\boxed{3}", '{"answer": 2, "level": 1}')
    assert "total 0, wrong (by correct)" in words and cells(table)["correct"][-1] == "wrong: 3 is not 2"
    words, table = score(page, "\\boxed{3}")
    assert "no verdict" in words and "give the expected answer" in words and cells(table)["correct"][0] == "-"
    with pytest.raises(UiError, match="The row is not JSON"):
        score(page, "x", '{"answer": 2,}')
    assert "right" in score(page, "\\boxed{\\{1,2\\}}", "{1, 2}")[0]  # a set is no row


def test_a_completion_of_a_run_is_taken_and_scored_as_the_run_did(page):
    words, table, question, given, text, cut = rewards_tab.pick(page, "mine", 3, 2)
    assert words == "In the run: total 2, right." and cells(table)["correct"] == ["1", "", "", "right"]
    assert (question, text, cut) == ("0 + 1?", "\\boxed{2}", False) and json.loads(given)["answer"] == "1"
    place = {"name": "mine", "step": 3, "number": 2, "question": question}
    words, table = score(page, text, given, **place)
    assert words.startswith("By rewards.py: total 0.2, wrong (by correct). In the run: total 2, right.")
    assert cells(table)["correct"][1] == "2", "the run's weight"
    assert cells(table)["short"] == ["1", "0.2", "0.2", "3 tokens"], "the run's number of tokens"


def test_a_very_long_completion_is_cut_for_display_and_scored_whole(page):
    _, _, question, given, text, _ = rewards_tab.pick(page, "mine", 3, 4)
    assert len(text) < 21_000 and "more characters are not shown" in text and SCRIPT not in text
    words, table = score(page, text, given, name="mine", step=3, number=4, question=question)
    assert cells(table)["correct"][-1] == "wrong: 7 is not 2"


def test_what_is_not_there_is_said(page):
    for place, expected in (
        (("mine", 3, 5), "has the completions 1 to 4"),
        (("mine", 9, 1), "no completions of step 9"),
        (("../mine", 3, 1), "There is no run"),
        ((None, None, None), "There is no run"),
    ):
        with pytest.raises(UiError, match=expected):
            rewards_tab.pick(page, *place)
    (page.runs.folder.parent / "q.jsonl").unlink()
    words, _, _, given, text, _ = rewards_tab.pick(page, "mine", 3, 1)
    assert "q.jsonl" in words and given == "" and text == "\\boxed{1}"


# --- files that do not work


@pytest.mark.parametrize(
    "more, expected",
    [
        ("def broken(:\n", "rewards.py:14: SyntaxError"),
        ("1 / 0\n", "rewards.py:14: ZeroDivisionError"),
        ("@reward\ndef fails(c):\n    return 1 / 0\n", "'fails' (rewards.py:16), row pasted: ZeroDivisionError"),
        ("@reward\ndef odd(c):\n    return 'x'\n", "'odd' (rewards.py:14), row pasted: returned 'x'"),
        ("import os\nos._exit(7)\n", "ended its process (status 7)"),
        ("raise SystemExit('enough')\n", "It printed last: enough"),
    ],
)
def test_a_file_that_fails_is_said_with_its_line(page, more, expected):
    words, table = score(page, "\\boxed{2}", "2", source=REWARDS + more)
    assert expected in words and table == []


@pytest.mark.parametrize("loop", ["while True: print('<b>on and on</b>' * 99)", "import time; time.sleep(99)"])
def test_a_function_that_hangs_is_ended_and_named(page, loop, monkeypatch):
    monkeypatch.setattr(rewards_tab, "SECONDS", 1.0)
    started = time.monotonic()
    words, table = score(page, "x", source=f"{REWARDS}@reward\ndef endless(c):\n    {loop}\n")
    assert time.monotonic() - started < 10
    assert "gave no answer within 1 s, it was in endless, line 16" in words and table == []


def test_what_a_function_starts_does_not_outlive_it(page, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards_tab, "SECONDS", 2.0)
    pid = tmp_path / "pid"
    more = f"""
import subprocess
@reward
def starts(c):
    child = subprocess.Popen(["sleep", "60"])
    open({str(pid)!r}, "w").write(str(child.pid))
    child.wait()
"""
    assert "gave no answer within 2 s" in score(page, "x", source=REWARDS + more)[0]
    time.sleep(0.3)
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid.read_text()], capture_output=True, text=True).stdout.strip()
    assert state == "" or state.startswith("Z")


def test_html_that_is_printed_or_given_as_a_reason_stays_text(page):
    more = f"@reward\ndef loud(c):\n    print({SCRIPT!r})\n    return 1, {SCRIPT!r}\n"
    words, table = score(page, SCRIPT + "\\boxed{2}", "2", source=REWARDS + more)
    assert words.endswith(f"It printed: {SCRIPT}") and cells(table)["loud"][-1] == SCRIPT
    blocks = built(page)
    for kind in (gr.HTML, gr.Chatbot):
        assert not [c for c in blocks.blocks.values() if isinstance(c, kind)]
    for table in (c for c in blocks.blocks.values() if isinstance(c, gr.Dataframe)):
        assert not {"markdown", "html"} & set([table.datatype] if isinstance(table.datatype, str) else table.datatype)
    outputs = {id(out) for f in blocks.fns.values() for out in f.outputs}
    assert not [c for c in blocks.blocks.values() if isinstance(c, gr.Markdown) and id(c) in outputs]


# --- a step once more


def test_a_step_is_scored_again_old_to_new(page):
    words, table = rewards_tab.rescore(page, "mine", 3, REWARDS)
    assert words.startswith("4 completions of step 3 by rewards.py:")
    figures = {line.split()[0]: line.split()[1:] for line in words.splitlines() if line.startswith("  ")}
    assert figures["correct"] == ["1.0000", "0.5000", "2"]
    assert figures["short"] == ["-", "0.2500", "4"]
    assert figures["total"] == ["2.0000", "1.0500", "2"]  # (2 + 0.2 + 2 + 0) / 4
    assert figures["verdicts:"] == ["2", "right", "->", "wrong"]
    assert [row[0] for row in table] == [4, 2, 1, 3], "the largest change first"
    assert table[1][2:7] == [
        "2",
        "0.2",
        "right -> wrong",
        "correct 1 -> 0; short - -> 1",
        "wrong: 2 is not 1; 3 tokens",
    ]
    assert table[2][2:5] == ["2", "2", "right"]
    assert SCRIPT in table[0][7] and len(table[0][7]) == 80
    words, table = rewards_tab.rescore(page, "mine", 3, REWARDS.replace('"math"', '"math", weight=9'))
    assert "2.0000      1.0500" in words, "the run's weight counts"
    words, table = rewards_tab.rescore(page, "mine", 3, REWARDS + "1 / 0\n")
    assert "ZeroDivisionError" in words and table == []


def test_questions_that_are_gone_are_left_out(page):
    rollouts = page.runs.get("mine").path / "rollouts/000003.jsonl"
    rollouts.write_text(rollouts.read_text().replace('"q0"', '"gone"'))
    words, table = rewards_tab.rescore(page, "mine", 3, REWARDS)
    assert "2 are left out" in words and [row[0] for row in table] == [4, 3]
    assert "not in the run's data" in rewards_tab.pick(page, "mine", 3, 1)[0]


# --- the editor


def test_the_file_is_saved_whole_and_what_does_not_import_is_kept_beside(page):
    file, draft = rewards_tab.places(page)
    os.chmod(file, 0o640)
    _, shown, loaded = rewards_tab.read_file(page, A)
    assert shown == loaded == REWARDS and "nothing to save" in rewards_tab.save(page, shown.strip(), loaded, A)[0]
    words, loaded = rewards_tab.save(page, REWARDS + "def broken(:", loaded, A)
    assert "Not saved: rewards.py:14: SyntaxError" in words and file.read_text() == loaded == REWARDS
    words, shown, loaded = rewards_tab.read_file(page, A)  # another visit
    assert "changes that are not in rewards.py" in words and shown == REWARDS + "def broken(:\n"
    assert loaded == REWARDS
    better = REWARDS.replace("<= 3", "<= 4")
    words, loaded = rewards_tab.save(page, better, loaded, A)
    assert words.startswith("Saved. Its rewards: correct 1, short 0.2.") and file.read_text() == loaded == better
    assert stat.S_IMODE(file.stat().st_mode) == 0o640 and not draft.exists()
    assert sorted(f.name for f in file.parent.iterdir()) == ["q.jsonl", "rewards.py", "runs"]


def test_a_file_that_changed_meanwhile_is_not_written_over(page):
    file, draft = rewards_tab.places(page)
    file.write_text(REWARDS + "# by another editor\n")
    words, _ = rewards_tab.save(page, REWARDS + "# mine\n", REWARDS, A)
    assert (
        "may have changed since it was read. Press Save once more" in words
        and "another" in file.read_text()
        and "mine" in draft.read_text()
    )
    words, shown, loaded = rewards_tab.drop(page, A)
    assert shown == loaded == file.read_text() and not draft.exists()
    words, loaded = rewards_tab.save(page, REWARDS + "# mine\n", None, A)  # the page has forgotten what it read
    assert "once more" in words and rewards_tab.save(page, REWARDS + "# mine\n", loaded, A)[0].startswith("Saved")


def test_what_is_not_saved_scores_and_changes_no_file(page):
    file, draft = rewards_tab.places(page)
    words, _ = score(page, "\\boxed{2}", "2", source=REWARDS.replace("weight=0.2", "weight=0.25"))
    assert "By rewards.py, with what is not saved: total" in words and file.read_text() == REWARDS
    assert "By rewards.py: total" in score(page, "\\boxed{2}", "2")[0]
    rewards_tab.keep(page, REWARDS + "# mine", A)  # as it is typed
    assert draft.read_text() == REWARDS + "# mine\n" == rewards_tab.read_file(page, A)[1]
    rewards_tab.keep(page, REWARDS, A)
    assert not draft.exists(), "as in the file again"


def test_no_window_touches_the_edits_of_another(page):
    file, draft = rewards_tab.places(page)
    rewards_tab.read_file(page, A), rewards_tab.read_file(page, B)
    assert "is kept in rewards.draft.py" in rewards_tab.keep(page, REWARDS + "# of A", A)
    assert "nothing to save" in rewards_tab.save(page, REWARDS, REWARDS, B)[0]
    for source in (REWARDS, REWARDS + "# of B"):
        assert "has the edits of another window" in rewards_tab.keep(page, source, B)
    words, loaded = rewards_tab.save(page, REWARDS + "# of B", REWARDS, B)
    assert words.startswith("Saved") and "of B" in file.read_text() and "of A" in draft.read_text()
    assert rewards_tab.read_file(page, B)[1] == REWARDS + "# of A\n", "the window goes on with those"
    assert "another window" in rewards_tab.keep(page, REWARDS + "# of A, more", A)


def test_what_is_typed_while_save_checks_is_kept(page):
    file, draft = rewards_tab.places(page)
    slow = REWARDS + "import time; time.sleep(1.5)\n"
    rewards_tab.read_file(page, A)
    with ThreadPoolExecutor() as threads:
        saving = threads.submit(rewards_tab.save, page, slow, REWARDS, A)
        time.sleep(0.7)
        rewards_tab.keep(page, slow + "# typed meanwhile", A)
        assert saving.result()[0].startswith("Saved")
        assert file.read_text() == slow and draft.read_text() == slow + "# typed meanwhile\n"
        list(threads.map(lambda n: [rewards_tab.keep(page, f"{REWARDS}# {n}", A) for _ in range(100)], range(4)))
    assert re.fullmatch(re.escape(REWARDS) + r"# \d\n", draft.read_text())


def test_a_file_may_read_what_lies_beside_it(page):
    (page.rewards_file.parent / "words.txt").write_text("one two")
    more = "from pathlib import Path\nW = (Path(__file__).parent / 'words.txt').read_text().split()\n"
    words, table = score(page, "x", source=REWARDS + more + "@reward\ndef known(c):\n    return len(W)\n")
    assert cells(table)["known"][0] == "2", words


def test_two_windows_score_each_its_own(page):
    sources = [REWARDS + f"@reward\ndef number(c):\n    return {n}\n" for n in range(4)]
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(lambda source: score(page, "x", source=source), sources))
    assert [cells(table)["number"][0] for _, table in results] == ["0", "1", "2", "3"]


def test_a_row_that_cannot_be_used_does_not_blame_the_file(page):
    words, table = score(page, "x", '{"prompt": 5, "answer": "4"}')
    assert words.startswith("The row or the settings cannot be used: TypeError") and table == []


def test_on_a_page_for_others_nothing_is_written_or_run(page, monkeypatch):
    page.editable = False
    monkeypatch.setattr("ui.reward_process.Popen", None)
    words, table, _, _, text, _ = rewards_tab.pick(page, "mine", 3, 2)  # what the run has saved
    assert "total 2, right" in words and text == "\\boxed{2}"
    offered = {f.api_name for f in built(page).fns.values()}
    assert offered == {"choose", "pick", "gae", "clip"}


# --- the page itself


def built(page):
    with gr.Blocks(analytics_enabled=False) as blocks:
        rewards_tab.build(page)
        learn_tab.build(page)
    return blocks


def test_neither_the_page_nor_reward_code_waits_for_imports_it_does_not_need():
    code = "import sys; from ui import reward_process; print({'gradio', 'pandas'} & set(sys.modules))\n"
    code += "from ui import rewards_tab; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["set()", "set()"], done.stderr


def test_the_tabs_answer_over_http(page, monkeypatch):
    gradio_client = pytest.importorskip("gradio_client")
    blocks = built(page)
    _, url, _ = blocks.queue().launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        client = gradio_client.Client(url, verbose=False)
        run, step, number = client.predict(None, None, 1, api_name="/choose")
        assert run["choices"] == [["mine", "mine"]] and (run["value"], step["value"], number) == ("mine", 3, 1)
        words, table, *fields = client.predict("mine", 3, 2, api_name="/pick")
        assert words == "In the run: total 2, right." and fields[2] == "\\boxed{2}"
        words, table = client.predict("mine", 3, 2, *fields, REWARDS, api_name="/score")
        assert "total 0.2, wrong" in words and table["data"][0][0] == "correct"
        words, _ = client.predict("mine", 3, REWARDS, api_name="/rescore")
        assert "verdicts: 2 right -> wrong" in words
        monkeypatch.setattr(rewards_tab, "SECONDS", 3.0)
        endless = REWARDS + "@reward\ndef endless(c):\n    while True: pass\n"
        job = client.submit("mine", 3, 2, *fields, endless, api_name="/score")
        assert "above 1.28" in client.predict(1.5, 1, 0.2, 0.28, api_name="/clip")[0]
        assert not job.done(), "a function that hangs does not hold up the page"
        assert "was in endless" in job.result()[0]
        episode = {"headers": ["token", "reward", "value"], "data": [["a", "0", 0.5], ["b", 1, 0.25]]}
        words, table, drawn, _ = client.predict(episode, 1.0, 0.5, 0.0, api_name="/gae")
        assert table["data"][0][2] == 0.125 and drawn["columns"] == ["x", "y", "series"]
        with pytest.raises(Exception, match="no completions of step 9"):
            client.predict("mine", 9, 2, api_name="/pick")
    finally:
        blocks.close()
