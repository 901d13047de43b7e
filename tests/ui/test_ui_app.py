"""Who may reach the page, and what can be read through it."""

import contextlib
import subprocess
import sys

import httpx
import pytest

gr = pytest.importorskip("gradio")

from ui import app  # noqa: E402


@contextlib.contextmanager
def served(tmp_path, **settings):
    blocks, address = app.launch(app.Settings(runs=tmp_path / "runs", port=0, **settings))
    try:
        yield address
    finally:
        blocks.close()


def test_an_empty_runs_folder_and_requests_of_other_sites(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    with served(tmp_path) as address:
        page = httpx.get(address)
        assert page.status_code == 200 and "Ponder" in page.text
        assert page.headers["content-security-policy"] == "frame-ancestors 'self'"
        own = address.rstrip("/")
        assert httpx.get(address, headers={"Origin": own}).status_code == 200
        for headers in (
            {"Origin": "http://other.test"},
            {"Origin": "null"},
            {"Origin": "http://["},
        ):
            refused = httpx.get(address, headers=headers)
            assert refused.status_code == 403 and refused.text.startswith("Refused"), headers
        assert httpx.get(address, headers={"Host": "other.test"}).status_code == 400
        asking = {"Origin": "http://other.test", "Access-Control-Request-Method": "POST"}
        for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/config"):  # what browsers ask before they send
            assert "access-control-allow-origin" not in httpx.options(f"{own}{path}", headers=asking).headers
        assert httpx.get(f"{own}/monitoring").status_code in (403, 404)
        assert not httpx.get(f"{own}/config").json().get("analytics_enabled")
        paths = ("secret.txt", "../secret.txt", str(tmp_path / "secret.txt"), "/etc/passwd", str(app.ROOT / "train.py"))
        for path in paths:
            for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/"):
                found = httpx.get(f"{own}/{route}{path}")
                assert found.status_code in (403, 404, 405) and "secret" not in found.text.replace(path, ""), found.url


def test_others_are_let_in_by_name_and_password_alone(tmp_path, capsys):
    for settings in (
        app.Settings(host="0.0.0.0"),
        app.Settings(share=True),
        app.Settings(host="0.0.0.0", auth="me"),
        app.Settings(host="::1", auth="me:secret"),
    ):
        with pytest.raises(SystemExit, match="error: (host|auth): "):
            app.launch(settings)
    with served(tmp_path, auth="me:secret") as address:
        own = address.rstrip("/")
        assert httpx.get(f"{own}/config").status_code == 401
        with httpx.Client() as client:
            wrong = client.post(f"{own}/login", data={"username": "me", "password": "no"})
            assert wrong.status_code == 400
            assert client.post(f"{own}/login", data={"username": "me", "password": "secret"}).status_code == 200
            assert client.get(f"{own}/config").status_code == 200


def test_elsewhere_nothing_is_edited_or_started(tmp_path):
    """There the page has no endpoints for it at all."""
    here, elsewhere = (
        {str(f.api_name) for f in app.build(settings).fns.values()}
        for settings in (app.Settings(runs=tmp_path), app.Settings(runs=tmp_path, host="0.0.0.0", auth="a:b"))
    )
    changing = {"start_run", "resume_run", "stop_run", "show_command"}
    assert changing <= here and not changing & elsewhere
    assert not [name for name in elsewhere if any(word in name for word in ("start", "stop_run", "save", "score"))]


def test_a_port_that_is_taken(tmp_path):
    with served(tmp_path) as address, pytest.raises(OSError, match="port"):
        app.launch(app.Settings(runs=tmp_path, port=int(address.rstrip("/").rpartition(":")[2])))


def test_help():
    shown = subprocess.run([sys.executable, "ui/app.py", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "NAME:PASSWORD" in shown.stdout
