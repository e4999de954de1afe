"""What strangers send to the port of `watch`: one line back, in bounded time, with a bounded number of threads."""

import contextlib
import re
import socket
import threading
import time
from pathlib import Path

import pytest

from beitforge.pipeline.watch import server as server_module
from tests.pipeline.watch.watching import wait_for


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        ("GET //[ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        ("GET / HTTP/9.9\r\n\r\n", 505),
        ("GET / HTTP/x\r\n\r\n", 400),
        ("\0\x1b[2J\r\n\r\n", 400),
        ("BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        ("GET " + "a" * 70_000 + " HTTP/1.1\r\n\r\n", 414),
        ("GET / HTTP/1.1\r\n" + "X: y\r\n" * 200 + "\r\n", 431),
        ("GET / HTTP/1.1\r\nX: " + "y" * 70_000 + "\r\n\r\n", 431),
        ("GET /live?since={server}-" + "9" * 5000 + " HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        ("GET /live?since=%ff%00-1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
    ],
    ids=lambda value: value[:30].encode("unicode_escape").decode() if isinstance(value, str) else "",
)
def test_malformed_requests_get_a_line(watch, text, status):
    """And no traceback: `watching` looks at what the server says when it ends."""
    server = watch.live()["stamp"].partition("-")[0]
    with socket.create_connection((watch.host, watch.port), timeout=20) as connection:
        connection.sendall(text.replace("{server}", server).encode("latin-1"))
        answer = connection.recv(1 << 16).decode("latin-1")
    assert answer.split()[1] == str(status), answer[:200]
    assert "Content-Security-Policy" in answer and "Python" not in answer


def test_slow_clients_are_bounded(watch):
    """A number of connections and no more, each for so long; whoever comes later is answered again."""
    held = []
    for _ in range(80):
        connection = socket.create_connection((watch.host, watch.port), timeout=20)
        connection.sendall(b"GET / HT")
        held.append(connection)
    time.sleep(0.5)
    threads = Path(f"/proc/{watch.process.pid}/status").read_text()
    assert int(re.search(r"Threads:\s+(\d+)", threads)[1]) < 75
    for connection in held:
        connection.close()
    wait_for(lambda: watch.ask("/nothing")[0].status == 404, watch.process)


def test_a_request_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(server_module, "_REQUEST_SECONDS", 0.3)
    server = server_module.Server("127.0.0.1", 0, lambda: "page", lambda _: {})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    with socket.create_connection(server.server_address, timeout=10) as connection:
        begun = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begun < 5:
                connection.sendall(b"G")
                if connection.recv(1, socket.MSG_DONTWAIT) == b"":
                    break
        while time.monotonic() - begun < 5:
            try:
                if connection.recv(1) == b"":
                    break
            except OSError:
                break
    assert time.monotonic() - begun < 3
    server.shutdown()
    server.server_close()
    thread.join()
