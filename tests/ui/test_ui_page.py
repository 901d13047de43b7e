"""The page in a real browser, at two widths, on a real run: both answers stream, verdicts appear, nothing leaves the machine.

Slow, and skipped where Debian's chromium is not installed. `python tests/ui/test_ui_page.py` makes the README's screenshots.
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
    pytest.mark.skipif(not CHROMIUM, reason="no chromium here (Debian: apt install chromium)"),
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
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def served(folder: Path, *arguments: str):
    """The page over this runs folder, as its user starts it: its address."""
    port = free_port()
    command = [sys.executable, "ui/app.py", "--runs", str(folder / "runs"), "--port", str(port), *arguments]
    with open(folder / "page.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "page.log").read_text()
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", port)) == 0:
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
def opened(chromium, address: str, width: int):
    """The page in a window of this width; what it asked the network for, and what went wrong in it."""
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
    """A tab, which at phone width may be behind the dots."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.count() or not tab.first.is_visible():
        page.locator("button.overflow-menu, .overflow-menu button").first.click()
        page.locator(".overflow-dropdown button", has_text=name).first.click()
    else:
        tab.first.click()


def wait_until(what, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.1)


def value_of(page, field: str) -> str:
    return page.locator(f"#{field} textarea").input_value()


def texts_while(page, act) -> list[tuple[str, str]]:
    """What both chats said, one after the other, from the click until the verdicts."""
    page.evaluate(
        """() => {
            const said = () => ['left', 'right'].map(side =>
                [...document.querySelectorAll(`#${side}-chat [data-testid=bot]`)].map(e => e.innerText).join('|'))
            window.seen = [said()]
            window.watching = new MutationObserver(() => {
                const now = said()
                if (now.join() != window.seen.at(-1).join()) window.seen.push(now)
            })
            for (const side of ['left', 'right'])
                window.watching.observe(document.getElementById(`${side}-chat`),
                                        {childList: true, subtree: true, characterData: true})
        }"""
    )
    act()
    wait_until(lambda: value_of(page, "left-verdict") and value_of(page, "right-verdict"), 90)
    return [tuple(both) for both in page.evaluate("() => { window.watching.disconnect(); return window.seen }")]


def ask_held_out(page, number: int) -> None:
    """Put a held-out question, and wait for both verdicts."""
    page.get_by_label("Held-out question number").fill(str(number))
    page.get_by_role("button", name="Load this question").click()
    wait_until(lambda: page.get_by_label("Question", exact=True).first.input_value() != "")
    page.get_by_role("button", name="Ask both").click()
    wait_until(lambda: value_of(page, "left-verdict") and value_of(page, "right-verdict"), 90)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run of the tiny model in runs/."""
    folder = tmp_path_factory.mktemp("page")
    command = [sys.executable, "train.py", *RUN.split(), "--output-dir", str(folder / "runs/tiny")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    return folder


@pytest.mark.parametrize("width", WIDTHS)
def test_a_person_uses_the_page(trained, width):
    shutil.copy("rewards.py", trained / "rewards.py")
    with (
        served(trained, "--rewards-file", str(trained / "rewards.py")) as address,
        browser() as chromium,
        opened(chromium, address, width) as page,
    ):
        ask_held_out(page, 3)
        said = [value_of(page, f"{side}-verdict") for side in ("left", "right")]
        assert all("Expected: " in text for text in said) and any(text.startswith("correct") for text in said)
        chats = [page.locator(f"#{side}-chat").inner_text() for side in ("left", "right")]
        assert chats[0] != chats[1] and "boxed" in chats[0]

        page.get_by_role("button", name="New chat").click()
        wait_until(lambda: value_of(page, "left-verdict") == "")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Greedy: always").uncheck()
        page.get_by_label("number input for Temperature").fill("2")  # both go on and on
        page.get_by_label("Question", exact=True).first.fill(HOSTILE)
        seen = texts_while(page, lambda: page.get_by_role("button", name="Ask both").click())
        left, right = (list(dict.fromkeys(filter(None, texts))) for texts in zip(*seen))
        assert len(left) > 2 and len(right) > 2, seen  # they grew before one's eyes
        both = [i for i, (a, b) in enumerate(seen) if a and b]
        assert any(seen[i][0] != left[-1] and seen[i][1] != right[-1] for i in both), "one after the other"
        assert HOSTILE in page.locator("#left-chat").inner_text() and page.evaluate("() => window.hacked") is None

        open_tab(page, "What changed")
        wait_until(lambda: "fixed" in value_of(page, "changes"))
        page.locator('#changed-table [data-testid="cell-0-3"]').first.click()
        wait_until(lambda: "Expected:" in value_of(page, "changed-question"))

        open_tab(page, "Watch")
        wait_until(lambda: "step 8 of 8" in value_of(page, "watch-status"))
        slider, seen = page.get_by_label("number input for Step").first, [""]
        asked = page.get_by_label("Question", exact=True).locator("visible=true").first  # the first prompt of the step
        for step in (None, "1", "2"):
            if step:
                slider.fill(step)
                slider.press("Enter")
            wait_until(lambda: asked.input_value() not in ("", seen[-1]))
            seen.append(asked.input_value())

        open_tab(page, "Rewards")
        editor = page.locator(".cm-content[contenteditable=true]").first
        wait_until(lambda: len(editor.inner_text()) > 100)
        editor.click()
        page.keyboard.press("Control+End")
        page.keyboard.insert_text("\n\n@reward(weight=0.5)\ndef generous(completion): return 0.25, 'for nothing'\n")
        page.get_by_role("button", name="Save", exact=True).click()
        wait_until(lambda: "def generous" in (trained / "rewards.py").read_text())
        page.get_by_role("button", name="Take this completion").click()
        wait_until(lambda: page.get_by_label("completion, with its thinking").input_value())
        page.get_by_role("button", name="Score", exact=True).click()
        wait_until(lambda: page.get_by_label("verdict", exact=True).input_value().startswith("By rewards.py: total"))
        for cell in ("generous", "0.125", "for nothing"):
            page.get_by_text(cell, exact=True).locator("visible=true").first.wait_for()
        page.get_by_role("button", name="Rescore the step").click()
        wait_until(lambda: "generous" in page.locator(".cm-content").last.inner_text())


def test_a_run_is_started_and_watched_from_its_first_step(tmp_path):
    """Over an empty folder, as on the first day."""
    (tmp_path / "runs").mkdir()
    with served(tmp_path) as address, browser() as chromium, opened(chromium, address, 1280) as page:
        open_tab(page, "Watch")
        wait_until(lambda: "There is no run yet" in value_of(page, "watch-status"))
        time.sleep(1)
        assert not page.locator(".toast-body").count(), page.locator(".toast-body").all_inner_texts()
        page.get_by_role("button", name="Start or stop a run").click()
        page.get_by_label("Other settings").fill(RUN.replace("--max-steps 8", "--max-steps 4"))
        wait_until(lambda: "--max-steps 4" in page.get_by_label("The command", exact=True).input_value())
        page.get_by_role("button", name="Start it").click()
        wait_until(lambda: "Finished: step 4 of 4" in value_of(page, "watch-status"), 120)
        plots = page.evaluate(
            """() => [...document.querySelectorAll('svg.marks')].map(svg => [
                [...[...svg.querySelectorAll('.role-axis')].at(-1).querySelectorAll('.role-axis-label text')].map(e => e.textContent),
                [...svg.querySelectorAll('.mark-line path')].map(e => e.getAttribute('d').length)])"""
        )
        assert len(plots) == 9
        for ticks, lines in plots:  # numbers along an axis, and no words: these would not be evenly spaced
            known = sorted({float(tick.replace(",", "")) for tick in ticks})
            gaps = [round(high - low, 3) for low, high in zip(known, known[1:])]
            assert len(gaps) >= 1 and len(set(gaps)) == 1 and lines and all(lines), (ticks, lines)
        prompts = page.get_by_text("of 8", exact=False).locator("visible=true")
        assert int(page.get_by_label("number input for Step").first.input_value()) >= 1 and prompts.count() >= 4


def test_the_page_answers_while_a_run_trains_beside_it(trained, tmp_path):
    """Another tab's click is answered within a second, the first token comes within one."""
    command = [sys.executable, "train.py", "--max-steps", "40", "--eval-steps", "0", "--device", "cpu"]
    with served(trained) as address, browser() as chromium, opened(chromium, address, 1280) as page:
        ask_held_out(page, 1)  # the model is loaded
        run = subprocess.Popen(
            [*command, "--output-dir", str(trained / "runs/beside")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: (trained / "runs/beside/metrics.jsonl").is_file(), 120)
            page.get_by_label("Question", exact=True).first.fill("3 + 4 = ?")
            started = time.monotonic()
            page.get_by_role("button", name="Ask both").click()
            wait_until(lambda: page.locator("#left-chat [data-testid='bot']").all_inner_texts()[-1:] not in ([], [""]))
            first_token, started = time.monotonic() - started, time.monotonic()
            open_tab(page, "What changed")
            wait_until(lambda: "fixed" in value_of(page, "changes"))
            print(f"first text {first_token:.2f} s, another tab {time.monotonic() - started:.2f} s")
            assert (
                first_token < 3 and time.monotonic() - started < 3
            )  # three times what is promised: machines are shared
        finally:
            run.terminate()
            run.wait(60)
            shutil.rmtree(trained / "runs/beside")


def screenshots(folder: Path) -> None:
    """docs/page_compare.png and docs/page_watch.png, of the newest run in folder/runs."""
    with served(folder) as address, browser() as chromium, opened(chromium, address, 1280) as page:
        ask_held_out(page, 20)  # loads the model
        page.get_by_role("button", name="New chat").click()
        for number in range(1, 20):  # a question that the base gets wrong and the run right
            ask_held_out(page, number)
            if not value_of(page, "left-verdict").startswith("correct") and value_of(page, "right-verdict").startswith(
                "correct"
            ):
                break
            page.get_by_role("button", name="New chat").click()
        page.locator("#right-chat").get_by_text("Thinking").click()  # unfolds
        page.evaluate("() => window.scrollTo(0, 0)")
        time.sleep(1)
        page.screenshot(path="docs/page_compare.png")
        open_tab(page, "Watch")
        wait_until(lambda: "step" in value_of(page, "watch-status"))
        time.sleep(4)
        page.set_viewport_size({"width": 1280, "height": 1400})
        page.screenshot(path="docs/page_watch.png")
        print("docs/page_compare.png, docs/page_watch.png")


if __name__ == "__main__":
    screenshots(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
