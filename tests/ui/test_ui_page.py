"""The page in a real browser, at two widths, on a real run: answers stream, verdicts appear, all requests are local.

Slow, and skipped if chromium is not installed. `python tests/ui/test_ui_page.py` makes the screenshots of the README.
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
WIDTHS = 1280, 400
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
def open_page(chromium, address: str, width: int):
    """Open the page in a window of this width. At the end, check its requests, its errors and its browser storage."""
    context = chromium.new_context(viewport={"width": width, "height": 900})
    page, hosts, errors = context.new_page(), set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.get_by_role("button", name="Ask both").wait_for(timeout=30_000)
    yield page
    assert hosts - {None, ""} == {"127.0.0.1"}, hosts  # None: data: and blob:
    assert not errors
    stored = page.evaluate("() => Object.keys(localStorage).concat(Object.keys(sessionStorage))")
    assert [key for key in stored if "theme" not in key.lower()] == []
    context.close()


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


def record_chats(page, action) -> list[tuple[str, str]]:
    """Call `action`, and return the successive texts of both chats until the verdicts."""
    page.evaluate(
        """() => {
            const texts = () => ['left', 'right'].map(side =>
                [...document.querySelectorAll(`#${side}-chat [data-testid=bot]`)].map(e => e.innerText).join('|'))
            window.seen = [texts()]
            window.observer = new MutationObserver(() => {
                const now = texts()
                if (now.join() != window.seen.at(-1).join()) window.seen.push(now)
            })
            for (const side of ['left', 'right'])
                window.observer.observe(document.getElementById(`${side}-chat`),
                                        {childList: true, subtree: true, characterData: true})
        }"""
    )
    action()
    wait_until(lambda: read_value(page, "left-verdict") and read_value(page, "right-verdict"), 90)
    return [tuple(texts) for texts in page.evaluate("() => { window.observer.disconnect(); return window.seen }")]


def ask_held_out(page, number: int) -> None:
    """Ask a held-out question, and wait for both verdicts."""
    page.get_by_label("Held-out question number").fill(str(number))
    page.get_by_role("button", name="Load this question").click()
    wait_until(lambda: page.get_by_label("Question", exact=True).first.input_value() != "")
    page.get_by_role("button", name="Ask both").click()
    wait_until(lambda: read_value(page, "left-verdict") and read_value(page, "right-verdict"), 90)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run of the tiny model in runs/."""
    folder = tmp_path_factory.mktemp("page")
    command = [sys.executable, "train.py", *RUN.split(), "--output-dir", str(folder / "runs/tiny")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    return folder


@pytest.mark.parametrize("width", WIDTHS)
def test_all_tabs_work_in_a_browser(trained, width):
    shutil.copy("rewards.py", trained / "rewards.py")
    with (
        served(trained, "--rewards-file", str(trained / "rewards.py")) as address,
        browser() as chromium,
        open_page(chromium, address, width) as page,
    ):
        ask_held_out(page, 3)
        verdicts = [read_value(page, f"{side}-verdict") for side in ("left", "right")]
        assert all("Expected: " in text for text in verdicts) and any(text.startswith("correct") for text in verdicts)
        chats = [page.locator(f"#{side}-chat").inner_text() for side in ("left", "right")]
        assert chats[0] != chats[1] and "boxed" in chats[0]

        page.get_by_role("button", name="New chat").click()
        wait_until(lambda: read_value(page, "left-verdict") == "")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Greedy: always").uncheck()
        page.get_by_label("number input for Temperature").fill("2")  # makes both answers long
        page.get_by_label("Question", exact=True).first.fill(HOSTILE)
        seen = record_chats(page, lambda: page.get_by_role("button", name="Ask both").click())
        left, right = (list(dict.fromkeys(filter(None, texts))) for texts in zip(*seen))
        updates = sorted([len(left), len(right)])
        assert updates[0] > 1 and updates[1] > 2, seen  # both answers were streamed; one of them may be short
        both = [i for i, (a, b) in enumerate(seen) if a and b]
        assert any(seen[i][0] != left[-1] and seen[i][1] != right[-1] for i in both), (
            "the sides did not stream together"
        )
        assert HOSTILE in page.locator("#left-chat").inner_text() and page.evaluate("() => window.hacked") is None

        open_tab(page, "What changed")
        wait_until(lambda: "fixed" in read_value(page, "changes"))
        page.locator('#changed-table [data-testid="cell-0-3"]').first.click()
        wait_until(lambda: "Expected:" in read_value(page, "changed-question"))

        open_tab(page, "Watch")
        wait_until(lambda: "step 8 of 8" in read_value(page, "watch-status"))
        slider, seen = page.get_by_label("number input for Step").first, [""]
        question = page.get_by_label("Question", exact=True).locator("visible=true").first  # the first prompt
        for step in (None, "1", "2"):
            if step:
                slider.fill(step)
                slider.press("Enter")
            wait_until(lambda: question.input_value() not in ("", seen[-1]))
            seen.append(question.input_value())

        open_tab(page, "Rewards")
        editor = page.locator(".cm-content[contenteditable=true]").first
        wait_until(lambda: len(editor.inner_text()) > 100)
        editor.click()
        page.keyboard.press("Control+End")
        page.keyboard.insert_text("\n\n@reward(weight=0.5)\ndef generous(completion): return 0.25, 'for nothing'\n")
        page.get_by_role("button", name="Save", exact=True).click()
        wait_until(lambda: "def generous" in (trained / "rewards.py").read_text())
        page.get_by_role("button", name="Load this completion").click()
        wait_until(lambda: page.get_by_label("Completion, including thinking").input_value())
        page.get_by_role("button", name="Score", exact=True).click()
        wait_until(
            lambda: page.get_by_label("Verdict", exact=True).input_value().startswith("Scored with rewards.py: total")
        )
        for cell in ("generous", "0.125", "for nothing"):
            page.get_by_text(cell, exact=True).locator("visible=true").first.wait_for()
        page.get_by_role("button", name="Rescore the step").click()
        wait_until(lambda: "generous" in page.locator(".cm-content").last.inner_text())


def test_starts_and_watches_the_first_run(tmp_path):
    """The runs folder is empty at first."""
    (tmp_path / "runs").mkdir()
    with served(tmp_path) as address, browser() as chromium, open_page(chromium, address, 1280) as page:
        open_tab(page, "Watch")
        wait_until(lambda: "There is no run yet" in read_value(page, "watch-status"))
        time.sleep(1)
        assert not page.locator(".toast-body").count(), page.locator(".toast-body").all_inner_texts()
        page.get_by_role("button", name="Start or stop a run").click()
        page.get_by_label("Other settings").fill(RUN.replace("--max-steps 8", "--max-steps 4"))
        wait_until(lambda: "--max-steps 4" in page.get_by_label("Command", exact=True).input_value())
        page.get_by_role("button", name="Start run").click()
        wait_until(lambda: "Finished: step 4 of 4" in read_value(page, "watch-status"), 120)
        plots = page.evaluate(
            """() => [...document.querySelectorAll('svg.marks')].map(svg => [
                [...[...svg.querySelectorAll('.role-axis')].at(-1).querySelectorAll('.role-axis-label text')].map(e => e.textContent),
                [...svg.querySelectorAll('.mark-line path')].map(e => e.getAttribute('d').length)])"""
        )
        assert len(plots) == 9
        for ticks, lines in plots:  # evenly spaced numbers: a categorical axis would not be evenly spaced
            values = sorted({float(tick.replace(",", "")) for tick in ticks})
            gaps = [round(high - low, 3) for low, high in zip(values, values[1:])]
            assert len(gaps) >= 1 and len(set(gaps)) == 1 and lines and all(lines), (ticks, lines)
        prompts = page.get_by_text("of 8", exact=False).locator("visible=true")
        assert int(page.get_by_label("number input for Step").first.input_value()) >= 1 and prompts.count() >= 4


def test_responds_while_a_run_trains(trained, tmp_path):
    """The goal is one second for the first token, and one for opening another tab."""
    command = [sys.executable, "train.py", "--max-steps", "40", "--eval-steps", "0", "--device", "cpu"]
    with served(trained) as address, browser() as chromium, open_page(chromium, address, 1280) as page:
        ask_held_out(page, 1)  # loads the model
        run = subprocess.Popen(
            [*command, "--output-dir", str(trained / "runs/beside")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: (trained / "runs/beside/metrics.jsonl").is_file(), 120)
            page.get_by_label("Question", exact=True).first.fill("3 + 4 = ?")
            start = time.monotonic()
            page.get_by_role("button", name="Ask both").click()
            wait_until(lambda: page.locator("#left-chat [data-testid='bot']").all_inner_texts()[-1:] not in ([], [""]))
            first_token, start = time.monotonic() - start, time.monotonic()
            open_tab(page, "What changed")
            wait_until(lambda: "fixed" in read_value(page, "changes"))
            print(f"first text {first_token:.2f} s, another tab {time.monotonic() - start:.2f} s")
            assert first_token < 3 and time.monotonic() - start < 3  # three times the goal, for shared machines
        finally:
            run.terminate()
            run.wait(60)
            shutil.rmtree(trained / "runs/beside")


def screenshots(folder: Path) -> None:
    """Write docs/page_compare.png and docs/page_watch.png for the newest run in folder/runs."""
    with served(folder) as address, browser() as chromium, open_page(chromium, address, 1280) as page:
        ask_held_out(page, 20)  # loads the model
        page.get_by_role("button", name="New chat").click()
        for number in range(1, 20):  # find a question that only the run answers correctly
            ask_held_out(page, number)
            if not read_value(page, "left-verdict").startswith("correct") and read_value(
                page, "right-verdict"
            ).startswith("correct"):
                break
            page.get_by_role("button", name="New chat").click()
        page.locator("#right-chat").get_by_text("Thinking").click()  # unfolds the thinking
        page.evaluate("() => window.scrollTo(0, 0)")
        time.sleep(1)
        page.screenshot(path="docs/page_compare.png")
        open_tab(page, "Watch")
        wait_until(lambda: "step" in read_value(page, "watch-status"))
        time.sleep(4)
        page.set_viewport_size({"width": 1280, "height": 1400})
        page.screenshot(path="docs/page_watch.png")
        print("docs/page_compare.png, docs/page_watch.png")


if __name__ == "__main__":
    screenshots(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
