"""Times of the page in Chromium: first load of each route, first token with a warm model, polls over 20 long runs.

    python bench/page.py [--rounds 5]

Needs chromium and playwright. The server is a process of its own. The runs are made in a temporary folder: 20 finished
runs of 5,000 steps with 2 KB of metrics per step, and one that grows before each poll.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ROUTES = "", "what-changed", "watch", "rewards", "learn"
RUNS, STEPS = 20, 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_long_runs(folder / "long")
        time_polls(folder / "long", rounds)
        time_browser(folder / "empty", folder / "long", rounds)


def describe(label: str, seconds: list[float]) -> None:
    print(
        f"{label:<44} median {statistics.median(seconds):.3f} s, {min(seconds):.3f} to {max(seconds):.3f}", flush=True
    )


def make_long_runs(folder: Path) -> None:
    extra = {f"part/{n}/mean": 0.123456789 for n in range(60)}
    lines = [json.dumps({"step": s, "reward": s / STEPS, "alarms": []} | extra) + "\n" for s in range(1, STEPS + 1)]
    first = folder / "run0"
    first.mkdir(parents=True)
    (first / "config.yaml").write_text(f"max_steps: {STEPS}\n")
    (first / "metrics.jsonl").write_text("".join(lines))
    for n in range(1, RUNS):
        shutil.copytree(first, folder / f"run{n}")


def time_polls(folder: Path, rounds: int) -> None:
    """Time the handler of the timer: first call, then with a run that grows before each call, then without a change."""
    from rl.run.reader import Runs
    from ui import watch_page
    from ui.launch import Launcher
    from ui.page import Page

    runs = Runs(folder)
    page = Page(runs, None, True, Path("rewards.py"), Launcher(runs))
    seen = {}

    def poll() -> float:
        nonlocal seen
        start = time.perf_counter()
        values = watch_page.follow(page, "run0", ["run1", "run2"], list(watch_page.METRICS)[:6], 0.5, seen)
        seconds = time.perf_counter() - start
        seen = values["seen"]
        return seconds

    print(f"{RUNS} runs of {STEPS:,} steps, three of them plotted")
    describe("first poll", [poll()])
    growing = []
    for n in range(rounds):
        with (folder / "run0/metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": STEPS + n + 1, "reward": 0.5, "alarms": []}) + "\n")
        growing.append(poll())
    describe("poll of a run that has grown", growing)
    describe("poll without a change", [poll() for _ in range(rounds)])


def time_browser(empty: Path, long_runs: Path, rounds: int) -> None:
    from playwright.sync_api import sync_playwright

    chromium_path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=chromium_path, args=["--no-sandbox"])
        with Server(long_runs) as address:
            for route in ROUTES:
                seconds = []
                for _ in range(rounds):
                    page = chromium.new_context(viewport={"width": 1440, "height": 900}).new_page()  # an empty cache
                    start = time.perf_counter()
                    page.goto(address + route)
                    page.locator("textarea, input, svg.marks").locator("visible=true").first.wait_for()
                    seconds.append(time.perf_counter() - start)
                    page.context.close()
                describe(f"first load of /{route}", seconds)
        with Server(empty) as address:
            page = chromium.new_context(viewport={"width": 1440, "height": 900}).new_page()
            page.goto(address)
            page.locator("#left-chat").get_by_text("choose one").wait_for()
            field = page.locator("#question textarea")
            seconds = []
            for n in range(rounds + 1):
                field.fill(f"What is {n} + 4?")
                start = time.perf_counter()
                field.press("Enter")
                page.wait_for_function(
                    "() => { const bot = document.querySelector(\"#left-chat [data-testid='bot']\");"
                    " return bot && !bot.innerText.includes('Waiting'); }",
                    polling=10,
                )
                seconds.append(time.perf_counter() - start)
                page.locator("#right-chat").get_by_text("tokens/s").wait_for()
                page.get_by_role("button", name="New chat").click()
                page.locator("#left-chat").get_by_text("choose one").wait_for()
            describe("first token, the model loaded before", seconds[1:])


class Server:
    """ui/app.py on a free port."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> str:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        command = [sys.executable, "ui/app.py", "--runs", str(self.folder), "--port", str(port)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ)
        for _ in range(300):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        time.sleep(3)  # the thread that owns the models imports its packages
        return f"http://127.0.0.1:{port}/"

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait(20)


if __name__ == "__main__":
    main()
