"""Access to the page: origins, hosts, passwords, files outside the runs folder, and read-only pages."""

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


def test_serves_an_empty_runs_folder_and_refuses_requests_of_other_sites(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    with served(tmp_path) as address:
        page = httpx.get(address)
        assert page.status_code == 200 and "Ponder" in page.text
        policy = page.headers["content-security-policy"]
        assert (
            "frame-ancestors 'self'" in policy and "default-src 'self' data: blob:;" in policy and "http" not in policy
        )
        for path in ("what-changed", "watch", "rewards", "learn"):
            assert httpx.get(f"{address}{path}").status_code == 200
        own = address.rstrip("/")
        assert httpx.get(address, headers={"Origin": own}).status_code == 200
        for headers in (
            {"Origin": "http://other.test"},
            {"Origin": "null"},
            {"Origin": "http://["},
        ):
            response = httpx.get(address, headers=headers)
            assert response.status_code == 403 and response.text.startswith("Refused"), headers
        assert httpx.get(address, headers={"Host": "other.test"}).status_code == 400
        preflight = {"Origin": "http://other.test", "Access-Control-Request-Method": "POST"}
        for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/config"):
            assert "access-control-allow-origin" not in httpx.options(f"{own}{path}", headers=preflight).headers
        assert httpx.get(f"{own}/monitoring").status_code in (403, 404)
        assert not httpx.get(f"{own}/config").json().get("analytics_enabled")
        paths = ("secret.txt", "../secret.txt", str(tmp_path / "secret.txt"), "/etc/passwd", str(app.ROOT / "train.py"))
        for path in paths:
            for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/"):
                response = httpx.get(f"{own}/{route}{path}")
                assert response.status_code in (403, 404, 405), response.url
                assert "secret" not in response.text.replace(path, ""), response.url


def test_other_machines_need_a_name_and_a_password(tmp_path, capsys):
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
            response = client.post(f"{own}/login", data={"username": "me", "password": "no"})
            assert response.status_code == 400
            assert client.post(f"{own}/login", data={"username": "me", "password": "secret"}).status_code == 200
            assert client.get(f"{own}/config").status_code == 200


def test_a_page_for_other_machines_has_no_endpoints_that_edit_or_start(tmp_path):
    local, remote = (
        {str(f.api_name) for f in app.build(settings).fns.values()}
        for settings in (app.Settings(runs=tmp_path), app.Settings(runs=tmp_path, host="0.0.0.0", auth="a:b"))
    )
    write_endpoints = {
        "start_run",
        "resume_run",
        "stop_run",
        "show_command",
        "check",
        "change_run",
        "delete_run",
        "save",
    }
    assert write_endpoints <= local and not write_endpoints & remote
    assert not [name for name in remote if any(word in name for word in ("start", "stop_run", "save", "score"))]


def test_raises_if_the_port_is_taken(tmp_path):
    with served(tmp_path) as address, pytest.raises(OSError, match="port"):
        app.launch(app.Settings(runs=tmp_path, port=int(address.rstrip("/").rpartition(":")[2])))


def test_help_lists_the_settings():
    result = subprocess.run([sys.executable, "ui/app.py", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "NAME:PASSWORD" in result.stdout
