"""The web page: compare the model before and after training, see what changed, watch a run, and try out rewards.

    make ui                                                   serve runs/ at 127.0.0.1
    python ui/app.py --runs FOLDER --port 7861
    python ui/app.py --host 0.0.0.0 --auth NAME:PASSWORD      let others on the network view runs and ask questions

The page sends nothing to other machines. The browser stores the theme, unsaved edits of the reward file, and an ID that
finds the chat again after a reload. Rewards can be edited and runs started only if the page is served to this machine alone
(the default). Requests from other sites' pages are refused.
"""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it on import

import contextlib
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gradio as gr  # noqa: E402
import tyro  # noqa: E402
from starlette.datastructures import Headers, MutableHeaders  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.middleware.trustedhost import TrustedHostMiddleware  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402

from grading.base import first_line  # noqa: E402
from rl.run.process import command_output  # noqa: E402
from rl.run.reader import Runs  # noqa: E402
from ui import chat_page, learn_page, questions_page, rewards_page, watch_page  # noqa: E402
from ui.launch import Launcher  # noqa: E402
from ui.page import Page  # noqa: E402
from ui.worker import Worker  # noqa: E402

LOOPBACK = ("127.0.0.1", "localhost")
PAGES = {"What changed": questions_page, "Watch": watch_page, "Rewards": rewards_page, "Learn": learn_page}
# Nothing is loaded from other machines, even if a model writes a link to an image.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'self'"
)
CSS = """
footer {display: none !important}
progress {width: 100%; height: 14px; accent-color: #f97316}
.status:has(textarea:placeholder-shown) {display: none}
.console textarea {font-family: ui-monospace, monospace; white-space: pre; overflow-x: auto}
@media (max-width: 640px) {
    .chat {height: 27vh !important}
}
"""


@dataclass
class Settings:
    runs: Path = Path("runs")  # folder with the runs
    rewards_file: Path = Path("rewards.py")  # reward file to edit and try out
    host: str = "127.0.0.1"  # address to listen on; any other than 127.0.0.1 requires --auth
    port: int = 7860  # port to listen on; 0: any free port
    auth: str | None = None  # NAME:PASSWORD for visitors
    share: bool = False  # public address through Gradio's servers; requires --auth

    @property
    def is_local(self) -> bool:
        return self.host in LOOPBACK and not self.share


class SameOriginMiddleware:
    """ASGI middleware that refuses requests from other sites' pages, and sets the POLICY of this one."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and origin.partition("://")[2] != headers.get("host"):
                response = PlainTextResponse("Refused: the request comes from another site's page.", 403)
                return await response(scope, receive, send)

        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).append("Content-Security-Policy", POLICY)
            await send(message)

        await self.app(scope, receive, send_with_policy)


def build(settings: Settings) -> gr.Blocks:
    """Build the page without serving it."""
    runs = Runs(settings.runs)
    page = Page(runs, Worker(runs), settings.is_local, settings.rewards_file, Launcher(runs))
    options = {"analytics_enabled": False, "fill_width": True, "delete_cache": (3600, 3600)}
    with gr.Blocks(title="Ponder", **options) as blocks:
        gr.Navbar(main_page_name="Chat")
        chat_page.build(page)
    for name, module in PAGES.items():
        with blocks.route(name):
            gr.Navbar(main_page_name="Chat")
            module.build(page)
    return blocks


def launch(settings: Settings) -> tuple[gr.Blocks, str]:
    """Serve the page from threads of this process. Returns the page and its address.

    Exits if others could reach the page without a password. Raises OSError if the port is taken.
    """
    if not settings.is_local and not settings.auth:
        sys.exit("error: auth: other machines can reach this page: set a password with --auth NAME:PASSWORD")
    if ":" in settings.host:
        sys.exit("error: host: expected a host name or an IPv4 address, such as 127.0.0.1 or 0.0.0.0")
    name, _, password = (settings.auth or "").partition(":")
    if settings.auth and not (name and password):
        sys.exit("error: auth: expected NAME:PASSWORD")
    hosts = LOOPBACK if settings.is_local else ["*"]  # another name may belong to a site that resolves to 127.0.0.1
    blocks = build(settings).queue(default_concurrency_limit=8, max_size=64)
    _, address, shared = blocks.launch(
        server_name=settings.host,
        server_port=settings.port or None,
        share=settings.share,
        auth=(name, password) if settings.auth else None,
        app_kwargs={
            "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(SameOriginMiddleware)]
        },
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        max_file_size="1mb",  # the page accepts no uploads
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    return blocks, shared or address


if __name__ == "__main__":
    with command_output():
        settings = tyro.cli(Settings, description=__doc__.split("\n")[0])
    settings.runs, settings.rewards_file = settings.runs.resolve(), settings.rewards_file.resolve()
    os.chdir(ROOT)  # data/tiny and configs/ are relative to the repository
    try:
        _, address = launch(settings)
    except OSError as error:  # the port is taken
        sys.exit(f"error: port: {first_line(error)}")
    print(f"Page: {address}, runs: {settings.runs} (Ctrl-C stops the page; runs started from it continue)", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # removes temporary files, as Ctrl-C does
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
