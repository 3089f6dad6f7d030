"""The network, absent or local, and a Ghostscript that tells when it is started."""

import http.server
import os
import socket
import threading

import pytest
from PIL import EpsImagePlugin


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail(f"tried to use the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)


@pytest.fixture
def server(tmp_path):
    """A local web server of the folder tmp_path/web; yields its address."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.fixture
def ghostscript(tmp_path_factory, monkeypatch):
    """A file that is there as soon as anything has started Ghostscript."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "gs").write_text(f"#!/bin/sh\ntouch '{folder}/started'\n", encoding="utf-8")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    # Pillow looks for it once, and a test before may have made it look.
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return folder / "started"
