"""The page in a real browser: every journey on a desktop and on a phone in dark mode, on a real run.

Slow, and skipped if chromium is not installed. `python tests/ui/test_ui_page.py` makes the screenshots of the docs.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed (Debian: apt install chromium)"),
]
pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
DESKTOP = {"viewport": {"width": 1440, "height": 900}, "color_scheme": "light"}
PHONE = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
DEVICES = pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone in dark mode"])
HOSTILE = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script><b>3 + 4</b>"
RUN = (
    "--max-steps 8 --eval-steps 4 --save-steps 4 --prompts-per-step 16 --eval-questions 60 --train-questions 400 "
    "--learning-rate 2e-3 --num-mini-batches 2 --device cpu"
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def served(folder: Path, *arguments: str):
    """Serve the page over folder/runs with ui/app.py. Yields its address."""
    port = free_port()
    command = [sys.executable, "ui/app.py", "--runs", str(folder / "runs"), "--port", str(port), *arguments]
    with open(folder / "page.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "page.log").read_text()
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def open_page(chromium, address: str, device: dict = DESKTOP):
    """Open the page. At the end, check its requests, its errors and what it stored in the browser."""
    context = chromium.new_context(**device)
    page, hosts, errors = context.new_page(), set(), []
    page.on("requestfinished", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.on("requestfailed", lambda request: request.failure == "csp" or hosts.add(urlsplit(request.url).hostname))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.locator("#question textarea").wait_for(timeout=30_000)
    wait_until(lambda: page.locator("#left-chat").get_by_text("choose one").count())
    yield page
    assert hosts - {None, ""} == {"127.0.0.1"}, hosts  # None: data: and blob:
    assert not errors and not page.locator(".toast-body").count()
    stored = page.evaluate("() => Object.keys(localStorage).concat(Object.keys(sessionStorage))")
    assert [k for k in stored if k not in ("ponder_tab", "ponder-rewards") and "theme" not in k.lower()] == []
    context.close()


def open_route(page, name: str) -> None:
    page.get_by_role("link", name=name).or_(page.get_by_role("button", name=name, exact=True)).first.click()
    page.wait_for_url(f"**/{name.lower().replace(' ', '-')}")


def open_tab(page, name: str) -> None:
    """Select a tab, which may be in the overflow menu at phone width."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.count() or not tab.first.is_visible():
        page.locator("button.overflow-menu, .overflow-menu button").first.click()
        page.locator(".overflow-dropdown button", has_text=name).first.click()
    else:
        tab.first.click()


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"timeout after {seconds:g} s"
        time.sleep(0.1)


def read_value(page, field: str) -> str:
    return page.locator(f"#{field} textarea").input_value()


def choose(page, label: str, option: str) -> None:
    """Choose an option of a dropdown."""
    field = page.get_by_label(label, exact=True).locator("visible=true").first
    field.click()
    page.get_by_role("option", name=option, exact=True).locator("visible=true").first.click()
    wait_until(lambda: field.input_value() == option)


def send(page, question: str) -> None:
    page.locator("#question textarea").fill(question)
    page.locator("#question textarea").press("Enter")
    wait_until(lambda: read_value(page, "question") == "")


def wait_for_answers(page, count: int = 1, sides=("left", "right")) -> None:
    """Wait until each side has `count` lines below its answers."""
    for side in sides:
        wait_until(lambda side=side: below(page, side).count() >= count, 90)


def below(page, side: str):
    """Return the lines below the answers of a side."""
    return page.locator(f"#{side}-chat").get_by_text("tokens/s")


def is_in_view(page, locator) -> bool:
    box = locator.bounding_box()
    height = page.viewport_size["height"]
    return box is not None and box["y"] >= -1 and box["y"] + min(box["height"], 60) <= height + 1


def ask_held_out(page, number: int) -> None:
    """Load a held-out question, and ask it."""
    page.get_by_label("Held-out question").fill(str(number))
    page.get_by_role("button", name="Load this one").click()
    wait_until(lambda: read_value(page, "question") != "")
    page.locator("#question textarea").press("Enter")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run of the tiny model in runs/."""
    folder = tmp_path_factory.mktemp("page")
    command = [sys.executable, "train.py", *RUN.split(), "--output-dir", str(folder / "runs/tiny")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    shutil.copy("rewards.py", folder / "rewards.py")
    return folder


@pytest.fixture(scope="module")
def chromium():
    with browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def site(trained, chromium):
    with served(trained, "--rewards-file", str(trained / "rewards.py")) as address:
        yield address, chromium


@DEVICES
def test_compares_two_models(site, device):
    with open_page(site[1], site[0], device) as page:
        page.locator("#left-chat").get_by_role("button").filter(has_text="=").first.click()  # an example
        wait_for_answers(page)
        for side in ("left", "right"):
            assert is_in_view(page, below(page, side).first), "the answers are on the screen"
        assert "the base model" in below(page, "left").inner_text() and "expected" in below(page, "left").inner_text()
        assert "tiny, step 8" in below(page, "right").inner_text()
        assert page.locator("#left-chat .katex").count(), "\\boxed{} is rendered"
        below(page, "left").click()
        page.locator("#left-chat").get_by_text("Prompt as the model reads it").wait_for()
        page.locator("#left-chat").get_by_role("cell", name="correct").wait_for()

        send(page, HOSTILE)
        send(page, "What is 3 + 4?")  # while the first one is being answered
        wait_for_answers(page, 3)
        assert HOSTILE in page.locator("#left-chat").inner_text() and page.evaluate("() => window.hacked") is None
        page.reload()
        wait_for_answers(page, 3)
        page.locator("#right-chat").get_by_role("button", name="Retry").last.click()
        wait_until(lambda: read_value(page, "status").startswith("Answered"))
        assert below(page, "right").count() == 3

        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Raw text").check()
        page.locator("#right-chat code").get_by_text("boxed").first.wait_for()
        page.get_by_role("button", name="Download").click()
        page.locator('a[href$="chat.jsonl"]').first.wait_for()
        page.locator("#question textarea").fill(" ")
        page.locator("#question textarea").press("Enter")
        wait_until(lambda: "There is no question" in read_value(page, "status"))
        assert below(page, "left").count() == 3, "an error does not cover the chats"
        page.get_by_role("button", name="New chat").click()
        wait_until(lambda: below(page, "left").count() == 0)


def test_nothing_is_loaded_for_an_image_in_a_text(site):
    with open_page(site[1], site[0]) as page:
        send(page, "![x](http://images.example/x.png) <img src='http://images.example/y.png'>")
        wait_for_answers(page)


@DEVICES
def test_chats_with_one_model(site, device):
    with open_page(site[1], site[0], device) as page:
        choose(page, "Mode", "One model")
        page.locator("#right-chat").wait_for(state="hidden")
        choose(page, "Model", "tiny, step 4")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Sampling").check()
        page.get_by_label("number input for Samples of each model").fill("3")
        page.get_by_label("Expected answer to your own").fill("7")
        send(page, "What is 3 + 4?")
        wait_until(lambda: "/3 correct" in read_value(page, "status"))
        assert below(page, "left").count() == 3 and "tiny, step 4" in below(page, "left").first.inner_text()


@DEVICES
def test_blind_vote(site, device):
    with open_page(site[1], site[0], device) as page:
        choose(page, "Mode", "Blind vote")
        wait_until(lambda: page.get_by_label("First model", exact=True).count())
        ask_held_out(page, 2)
        page.get_by_role("button", name="Left is better").wait_for()
        send(page, "Are you sure?")
        wait_until(lambda: page.locator("#left-chat").get_by_text("tokens", exact=False).count() >= 2)
        text = page.locator("#chats").inner_text()
        assert not [word for word in ("base", "step", "correct", "wrong") if word in text]
        page.get_by_role("button", name="Left is better").click()
        wait_until(lambda: "Votes: " in read_value(page, "status"))
        assert "expected" in below(page, "left").first.inner_text(), "the held-out question has a verdict"
        assert {"the base model" in below(page, side).first.inner_text() for side in ("left", "right")} == {True, False}


@DEVICES
def test_what_changed_and_many_questions(site, device):
    with open_page(site[1], site[0], device) as page:
        open_route(page, "What changed")
        wait_until(lambda: "questions fixed" in read_value(page, "changes"))
        page.locator('#changed-table [data-testid="cell-0-3"]').first.click()
        wait_until(lambda: "Expected:" in read_value(page, "changed-question"))
        assert is_in_view(page, page.locator("#changed-question")), "the answers are on the screen"
        open_tab(page, "Ask many")
        count = page.get_by_label("number input for Held-out questions")
        time.sleep(0.5)
        count.fill("20")
        count.press("Enter")
        time.sleep(0.5)
        assert count.input_value() == "20"
        page.get_by_role("button", name="Ask both").click()
        wait_until(lambda: "/20 correct" in read_value(page, "changes"))
        assert "Gain: " in read_value(page, "changes")


@DEVICES
def test_rescores_a_step(site, trained, device):
    shutil.copy("rewards.py", trained / "rewards.py")
    with open_page(site[1], site[0], device) as page:
        open_route(page, "Rewards")
        editor = page.locator(".cm-content[contenteditable=true]").first
        wait_until(lambda: len(editor.inner_text()) > 100)
        editor.click()
        page.keyboard.press("Control+End")
        page.keyboard.insert_text("\n\n@reward(weight=0.5)\ndef generous(completion): return 0.25, 'for nothing'\n")
        time.sleep(1)
        page.reload()
        wait_until(lambda: "unsaved edits" in page.get_by_label("File status").input_value())
        page.get_by_role("button", name="Save", exact=True).click()
        wait_until(lambda: "def generous" in (trained / "rewards.py").read_text())
        page.get_by_role("button", name="Load this completion").click()
        wait_until(lambda: page.get_by_label("Completion, including thinking").input_value())
        page.get_by_role("button", name="Score", exact=True).click()
        wait_until(lambda: "Scored with rewards.py: total" in page.get_by_label("Verdict", exact=True).input_value())
        for cell in ("generous", "0.125", "for nothing"):
            page.get_by_text(cell, exact=True).locator("visible=true").first.wait_for()
        page.get_by_role("button", name="Rescore the step").click()
        wait_until(lambda: "generous" in page.locator(".cm-content").last.inner_text())


def test_stops_a_looping_reward_function(site, trained):
    (trained / "rewards.py").write_text("from grading import reward\n@reward\ndef f(c):\n    while True: pass\n")
    with open_page(site[1], site[0]) as page:
        open_route(page, "Rewards")
        wait_until(lambda: "while True" in page.locator(".cm-content[contenteditable=true]").first.inner_text())
        page.get_by_label("Completion, including thinking").fill("x")
        page.get_by_role("button", name="Score", exact=True).click()
        wait_until(lambda: "Scoring" in read_value(page, "status"))
        page.get_by_role("button", name="Stop", exact=True).click()
        wait_until(lambda: read_value(page, "status") == "Stopped.", 5)
        page.get_by_role("button", name="Score", exact=True).click()  # the page is ready for the next task
        wait_until(lambda: "Scoring" in read_value(page, "status"), 5)
        page.get_by_role("button", name="Stop", exact=True).click()


@DEVICES
def test_learn(site, device):
    with open_page(site[1], site[0], device) as page:
        open_route(page, "Learn")
        wait_until(lambda: page.locator("svg.marks").count() == 4)
        heights = page.locator("svg.marks .mark-rect path").first.get_attribute("d")
        page.get_by_label("number input for Reward of completion 1").fill("0.5")
        page.get_by_label("number input for Reward of completion 1").press("Enter")
        wait_until(lambda: page.locator("svg.marks .mark-rect path").first.get_attribute("d") != heights)
        open_tab(page, "GAE")
        wait_until(
            lambda: "lambda 0.95: bias" in page.get_by_label("Summary").locator("visible=true").first.input_value()
        )
        open_tab(page, "PPO clip")
        wait_until(lambda: "CLIPPED" in page.get_by_label("Summary").locator("visible=true").first.input_value())


@DEVICES
def test_watches_a_run(site, device):
    with open_page(site[1], site[0], device) as page:
        open_route(page, "Watch")
        page.locator("#progress").get_by_text("tiny: Finished, step 8 of 8").wait_for()
        wait_until(lambda: page.locator("svg.marks").count() == 6)
        height = page.evaluate("document.documentElement.scrollHeight")
        assert height < 3000, height
        check_axes(page)
        open_tab(page, "Completions")
        slider, question = page.get_by_label("number input for Step").first, page.get_by_label("Question").first
        seen = [""]
        for step in (None, "1", "2"):
            if step:
                slider.fill(step)
                slider.press("Enter")
            wait_until(lambda: question.input_value() not in ("", seen[-1]))
            seen.append(question.input_value())
        page.locator(".score-token").locator("visible=true").nth(2).click()
        wait_until(lambda: page.get_by_label("Scale, or selected token").input_value().startswith("token "))
        open_tab(page, "Runs")
        page.get_by_text("8/8").locator("visible=true").first.wait_for()
        page.get_by_role("button", name="Export the selected run").click()
        page.locator('a[href$="tiny-step_000008.zip"]').first.wait_for()
        open_tab(page, "Console")
        console = page.locator(".console textarea").locator("visible=true").first
        last = page.evaluate(
            "e => [e.scrollHeight - e.scrollTop - e.clientHeight, e.value.trim().split('\\n').at(-1)]",
            console.element_handle(),
        )
        assert last[0] < 25 and "export.py" in last[1] or "train.py" in last[1], "the newest line is visible"


def check_axes(page) -> None:
    """The ticks of the steps are evenly spaced whole numbers, and each plot has a line."""
    plots = page.evaluate(
        """() => [...document.querySelectorAll('svg.marks')].map(svg => [
            [...[...svg.querySelectorAll('.role-axis')].filter(e => e.querySelector('.role-axis-title')?.textContent == 'step')
                .at(-1).querySelectorAll('.role-axis-label text')].map(e => e.textContent),
            [...svg.querySelectorAll('.mark-line path')].map(e => e.getAttribute('d').length),
            [...svg.querySelectorAll('.role-legend-title text')].map(e => e.textContent)])"""
    )
    assert len(plots) == 6
    for ticks, lines, legend in plots:  # a categorical axis would not be evenly spaced
        values = [float(tick.replace(",", "")) for tick in ticks]
        gaps = {round(high - low, 3) for low, high in zip(values, values[1:])}
        assert len(gaps) == 1 and all(value == int(value) for value in values) and "." not in "".join(ticks), ticks
        assert legend == ["run"] and lines and all(lines)


@DEVICES
def test_starts_stops_and_resumes_the_first_run(tmp_path, chromium, device):
    """The runs folder is empty at first, and the form that starts a run is the first thing on the page."""
    (tmp_path / "runs").mkdir()
    with served(tmp_path) as address, open_page(chromium, address, device) as page:
        start = page.get_by_role("button", name="3. Start")
        assert start.bounding_box()["y"] < page.locator("#left-chat").bounding_box()["y"]
        page.get_by_label("Training steps").fill("300")
        page.get_by_label("Other settings: options of train.py").fill(RUN.replace("--max-steps 8", ""))
        wait_until(lambda: "--max-steps 300" in page.get_by_label("Command", exact=True).input_value())
        wait_until(lambda: page.get_by_label("2. Does it fit on this machine?").input_value().startswith("It fits: "))
        start.click()
        page.wait_for_url("**/watch")
        progress = page.locator("#progress")
        wait_until(lambda: "Running, step" in progress.inner_text() and "min left" in progress.inner_text(), 120)
        wait_until(lambda: page.locator("svg.marks").count() == 6, 120)
        check_axes(page)
        page.get_by_role("button", name="Save and stop").click()
        wait_until(lambda: "Stopped early" in progress.inner_text())
        page.get_by_role("button", name="Resume").click()
        wait_until(lambda: "Running, step" in progress.inner_text(), 30)
        page.get_by_role("button", name="Save and stop").click()
        wait_until(lambda: "Stopped early" in progress.inner_text())
        open_tab(page, "Runs")
        page.get_by_label("Name of the selected run").fill("mine")
        page.get_by_label("Note").fill("first try")
        page.get_by_role("button", name="Save name and note").click()
        wait_until(lambda: "mine: Stopped early" in progress.inner_text())
        page.get_by_role("button", name="Delete").click()
        wait_until(lambda: "tick the box" in read_value(page, "watch-status"))
        page.get_by_label("Yes, delete").check()
        page.get_by_role("button", name="Delete").click()
        wait_until(lambda: not list((tmp_path / "runs").iterdir()))


def test_responds_while_a_run_trains(trained, chromium, tmp_path):
    """The goal is one second for the first token, and one for opening another page."""
    command = [sys.executable, "train.py", "--max-steps", "40", "--eval-steps", "0", "--device", "cpu"]
    with served(trained) as address, open_page(chromium, address) as page:
        ask_held_out(page, 1)  # loads the model
        wait_for_answers(page)
        run = subprocess.Popen(
            [*command, "--output-dir", str(trained / "runs/beside")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: (trained / "runs/beside/metrics.jsonl").is_file(), 120)
            start = time.monotonic()
            send(page, "3 + 4 = ?")
            wait_until(lambda: page.locator("#left-chat [data-testid='bot']").count() >= 3)
            first_token, start = time.monotonic() - start, time.monotonic()
            open_route(page, "What changed")
            wait_until(lambda: "fixed" in read_value(page, "changes"))
            print(f"first text {first_token:.2f} s, another page {time.monotonic() - start:.2f} s")
            assert first_token < 3 and time.monotonic() - start < 3  # three times the goal, for shared machines
        finally:
            run.terminate()
            run.wait(60)
            shutil.rmtree(trained / "runs/beside")


def screenshots(folder: Path) -> None:
    """Write the pictures in docs/ for the newest run in folder/runs."""
    with served(folder) as address, browser() as chromium, open_page(chromium, address) as page:
        for number in range(1, 20):  # find a question that only the run answers correctly
            ask_held_out(page, number)
            wait_for_answers(page)
            wait_until(lambda: "against" in read_value(page, "status"))
            if read_value(page, "status").startswith("not correct against correct"):
                break
            page.get_by_role("button", name="New chat").click()
            wait_until(lambda: below(page, "left").count() == 0)
        page.locator("#right-chat").get_by_text("Reasoning").click()  # unfolds the thinking
        page.evaluate("() => window.scrollTo(0, 0)")
        time.sleep(1)
        page.screenshot(path="docs/page_compare.png")
        open_route(page, "Watch")
        wait_until(lambda: page.locator("svg.marks").count() == 6)
        time.sleep(2)
        page.set_viewport_size({"width": 1440, "height": 1200})
        page.screenshot(path="docs/page_watch.png")
        open_route(page, "What changed")
        wait_until(lambda: "questions fixed" in read_value(page, "changes"))
        page.locator('#changed-table [data-testid="cell-0-3"]').first.click()
        time.sleep(1)
        page.set_viewport_size({"width": 1440, "height": 900})
        page.screenshot(path="docs/page_changed.png")
        print("docs/page_compare.png, docs/page_watch.png, docs/page_changed.png")


if __name__ == "__main__":
    screenshots(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
