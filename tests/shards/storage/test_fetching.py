"""Servers that are slow, wrong or never come to an end: each request ends in time, in memory, and by its name.

The servers are threads of this process and speak over sockets, byte by byte where it matters; nothing here forks.
"""

import contextlib
import email.utils
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from beitforge.shards.errors import ShardError
from beitforge.shards.format.manifest import read_image_manifest
from beitforge.shards.storage import fetching, remote, retry
from beitforge.shards.storage.cache import Cache
from beitforge.shards.storage.fetching import Asked, fetch
from beitforge.shards.storage.remote import Missing, Remote
from beitforge.shards.stream.image_set import ImageSet
from tests.shards.storage.test_remote import bucket

DATA = bytes(range(256)) * 16
Serve = Callable[[socket.socket, str, tuple[int, int] | None], None]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Seconds become tenths; and the pauses are noted, not waited for."""
    pauses: list[float] = []
    monkeypatch.setattr(fetching, "QUIET_SECONDS", 0.4)
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    return pauses


@contextlib.contextmanager
def server(serve: Serve) -> Iterator[tuple[str, list[str]]]:
    """A URL whose every connection is given to `serve`, with the path and the range that are asked for; and the
    requests so far."""
    listening = socket.create_server(("127.0.0.1", 0))
    requests: list[str] = []

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            asked = b""
            while b"\r\n\r\n" not in asked:
                if not (more := connection.recv(4096)):
                    return
                asked += more
            text = asked.decode()
            requests.append(text)
            span = None
            for line in text.split("\r\n"):
                if line.lower().startswith("range: bytes="):
                    start, _, stop = line.split("=")[1].partition("-")
                    span = int(start), int(stop) + 1
            serve(connection, text.split()[1], span)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", requests
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        remote._system.cache_clear()


def answer(status: str, headers: dict[str, object], body: bytes = b"") -> bytes:
    lines = [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "Connection: close", "", ""]).encode() + body


def part_of(span: tuple[int, int], **other: object) -> dict[str, object]:
    told = {"Content-Range": f"bytes {span[0]}-{span[1] - 1}/{len(DATA)}", "Content-Length": span[1] - span[0]}
    return {**told, **{name.replace("_", "-"): value for name, value in other.items()}}


def refused(url: str, whole: bool = False) -> str:
    """The line that a request ends with; in a few seconds, whatever the server does."""
    began = time.monotonic()
    with pytest.raises(ShardError, match=r"^[^\n]+$") as caught:
        if whole:
            Remote(url).whole("x", 10_000)
        else:
            Remote(url).part("x", 100, 300)
    assert time.monotonic() - began < 8
    assert f"{url}/x" in str(caught.value)
    return str(caught.value)


def test_what_is_asked_for_comes():
    def serve(connection: socket.socket, path: str, span: tuple[int, int] | None) -> None:
        if span is None:
            connection.sendall(answer("200 OK", {"Content-Length": len(DATA)}, DATA))
        else:
            connection.sendall(answer("206 Partial Content", part_of(span), DATA[span[0] : span[1]]))

    with server(serve) as (url, requests):
        assert Remote(url).part("x", 100, 300) == DATA[100:300]
        assert Remote(url).part("x", 7, 7) == b""
        assert Remote(url).whole("x", len(DATA)) == DATA
        assert len(requests) == 2
        with pytest.raises(ShardError, match=r"it has 4096 bytes and more are not read of such a file than 4095"):
            Remote(url).whole("x", len(DATA) - 1)


def drip(connection: socket.socket, head: bytes, piece: bytes, pause: float) -> None:
    connection.sendall(head)
    while True:
        connection.sendall(piece)
        time_sleep(pause)


time_sleep = time.sleep  # the real one


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("where", ["body", "chunks", "headers", "status", "nothing"])
def test_a_server_that_drips_is_given_up(where, whole):
    """A byte now and then: each resets every timeout between two bytes."""

    def serve(connection: socket.socket, path: str, span: tuple[int, int] | None) -> None:
        told = {"Content-Length": 5000} if span is None else part_of(span)
        status = "200 OK" if span is None else "206 Partial Content"
        if where == "body":
            drip(connection, answer(status, told), b"x", 0.05)
        elif where == "chunks":
            told.pop("Content-Length")
            drip(connection, answer(status, {**told, "Transfer-Encoding": "chunked"}), b"1\r\nx\r\n", 0.05)
        elif where == "headers":
            drip(connection, f"HTTP/1.1 {status}\r\n".encode(), b"X-A: b\r\n", 0.05)
        elif where == "status":
            drip(connection, b"", b"H", 0.05)
        else:
            time_sleep(3)

    with server(serve) as (url, requests):
        said = refused(url, whole)
        assert "a second" in said or "no answer" in said or "400" in said or "Expected HTTP" in said or "imeout" in said
        assert len(requests) == 3


def flood(connection: socket.socket, head: bytes, piece: bytes) -> None:
    connection.sendall(head)
    for _ in range(20_000):  # 20 GB
        connection.sendall(piece)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("where", ["body", "chunks", "headers"])
def test_a_server_without_end_fills_no_memory(where, whole):
    def serve(connection: socket.socket, path: str, span: tuple[int, int] | None) -> None:
        told = {} if span is None else part_of(span)
        told.pop("Content-Length", None)
        status, piece = "200 OK" if span is None else "206 Partial Content", bytes(1 << 20)
        if where == "body":
            flood(connection, answer(status, told), piece)
        elif where == "chunks":
            chunk = b"100000\r\n" + piece + b"\r\n"
            flood(connection, answer(status, {**told, "Transfer-Encoding": "chunked"}), chunk)
        else:
            flood(connection, f"HTTP/1.1 {status}\r\n".encode(), b"X-A: bcdefgh\r\n" * 70_000)

    with server(serve) as (url, _):
        tracemalloc.start()
        said = refused(url, whole)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 64 << 20, f"{most} bytes: {said}"


@pytest.mark.parametrize(
    ("status", "told", "said"),
    [
        ("200 OK", {"Content-Length": 4096}, "it answers 200 to a request for bytes 100 to 300, the whole file"),
        ("206 Partial Content", {"Content-Range": "bytes 0-199/4096", "Content-Length": 200}, "it does not keep to"),
        ("206 Partial Content", {"Content-Range": "bytes 100-298/4096", "Content-Length": 199}, "it does not keep to"),
        ("206 Partial Content", {"Content-Length": 200}, "it does not keep to"),
        ("206 Partial Content", {"Content-Type": "multipart/byteranges; boundary=x"}, "it does not keep to"),
        ("206 Partial Content", {"Content-Range": "bytes 100-299/*", "Content-Length": 199}, "199 came"),
        ("206 Partial Content", {"Content-Range": "bytes 100-299/*", "Content-Encoding": "gzip"}, "compressed"),
        ("204 No Content", {}, "answers 204"),
        ("304 Not Modified", {}, "status 304"),
        ("416 Range Not Satisfiable", {"Content-Range": "bytes */50"}, "beyond the end of its file"),
        ("400 Bad Request", {"Content-Length": 0}, "status 400"),
        ("500 Internal Server Error", {"Content-Length": 0}, "status 500"),
    ],
)
def test_wrong_answers_are_the_servers_fault(status, told, said):
    def serve(connection: socket.socket, path: str, span: tuple[int, int] | None) -> None:
        length = int(told.get("Content-Length", 0 if status[:3] in ("204", "304") else len(DATA)))
        connection.sendall(answer(status, told, DATA[:length]))

    with server(serve) as (url, requests):
        assert said in refused(url)
        assert len(requests) == (1 if status[0] in "34" else 3)


def test_a_body_that_is_shorter_than_its_headers_say():
    def serve(connection: socket.socket, path: str, span: tuple[int, int] | None) -> None:
        assert span is not None
        connection.sendall(answer("206 Partial Content", part_of(span), DATA[span[0] : span[1] - 50]))

    with server(serve) as (url, requests):
        refused(url)
        assert len(requests) == 3


def test_a_compressed_file_is_not_unpacked():
    def serve(connection: socket.socket, path: str, span: tuple[int, int] | None) -> None:
        connection.sendall(answer("200 OK", {"Content-Encoding": "gzip", "Content-Length": 4096}, DATA))

    with server(serve) as (url, requests):
        assert "compressed (gzip)" in refused(url, whole=True)
        assert all("accept-encoding: identity" in text.lower() for text in requests)


def test_redirects_without_end():
    def serve(connection: socket.socket, path: str, span: tuple[int, int] | None) -> None:
        connection.sendall(answer("302 Found", {"Location": f"{path}x", "Content-Length": 0}))

    with server(serve) as (url, requests):
        assert "redirects again and again" in refused(url)
        assert len(requests) <= 40


@pytest.mark.parametrize(("status", "error"), [("404 Not Found", Missing), ("410 Gone", Missing)])
def test_what_is_not_there(status, error):
    with server(lambda connection, *_: connection.sendall(answer(status, {}))) as (url, requests):
        with pytest.raises(error):
            Remote(url).part("x", 0, 10)
        assert len(requests) == 1


@pytest.mark.parametrize(
    ("asked", "low", "high"),
    [
        ("60", 60, 60),
        ("0", 0, 0),
        ("-5", 0, 0),
        ("soon", 0, 0),
        ("9" * 500, 300, 300),
        ("86400", 300, 300),
        ("a date in 100 s", 80, 100),
        ("Mon, 01 Jan 2001 00:00:00 GMT", 0, 0),
        ("Mon, 99 Foo 9999 99:99:99 GMT", 0, 0),
    ],
)
@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
def test_retry_after_is_honoured_and_bounded(impatient, status, asked, low, high):
    if asked.startswith("a date"):
        asked = email.utils.formatdate(time.time() + 100, usegmt=True)
    answers = iter([answer(status, {"Retry-After": asked, "Content-Length": 0})])

    def serve(connection: socket.socket, path: str, span: tuple[int, int] | None) -> None:
        assert span is not None
        whole = answer("206 Partial Content", part_of(span), DATA[span[0] : span[1]])
        connection.sendall(next(answers, whole))

    with server(serve) as (url, _):
        assert Remote(url).part("x", 100, 300) == DATA[100:300]
    assert len(impatient) == 1 and low <= impatient[0] <= 1.5 * high


def test_a_store_that_ignores_offsets_is_named_and_no_image_is_damaged(tiny, tmp_path):
    """Its headers say what was asked for, its bytes are the first ones."""
    folder = tiny.folder / "shards" / "train"

    def serve(connection: socket.socket, path: str, span: tuple[int, int] | None) -> None:
        data = (folder / Path(path).name).read_bytes()
        if span is None:
            connection.sendall(answer("200 OK", {"Content-Length": len(data)}, data))
        else:
            connection.sendall(answer("206 Partial Content", part_of(span), data[: span[1] - span[0]]))

    with server(serve) as (url, _):
        images = ImageSet(f"{url}/train", Cache(tmp_path / "cache", 10**9), chunk=4)
        with pytest.raises(ShardError, match=rf"{url}/train/shard-000000\.tar: the store sends other bytes") as caught:
            images.read(0, 5)
        assert "damaged" not in str(caught.value)


def test_a_manifest_without_end_is_refused(tmp_path):
    def serve(connection: socket.socket, path: str, span: tuple[int, int] | None) -> None:
        flood(connection, answer("200 OK", {"Transfer-Encoding": "chunked"}), b"10000\r\n" + bytes(1 << 16) + b"\r\n")

    with server(serve) as (url, _), pytest.raises(ShardError, match=f"{url}/set/manifest.json"):
        read_image_manifest(f"{url}/set")


class Ignorant(MemoryFileSystem):
    """Another store: it sends the whole file whatever it is asked for."""

    def cat_file(self, path, start=None, end=None, **_):
        return DATA


class Slow(MemoryFileSystem):
    def cat_file(self, path, start=None, end=None, **_):
        time_sleep(3)
        return DATA[start:end]


def test_other_stores(monkeypatch):
    files = MemoryFileSystem(skip_instance_cache=True)
    files.pipe_file("/set/x", DATA)
    assert fetch(files, "/set/x", Asked(10, 30, 20)) == DATA[10:30]
    assert fetch(files, "/set/x", Asked(0, None, 5000)) == DATA
    with pytest.raises(fetching.Fault, match="4096 bytes"):
        fetch(files, "/set/x", Asked(0, None, 4000))
    with pytest.raises(FileNotFoundError):
        fetch(files, "/set/nowhere", Asked(0, 10, 10))
    with pytest.raises(fetching.Fault, match="bytes 10 to 30 were asked for, 4096 came"):
        fetch(Ignorant(skip_instance_cache=True), "/set/x", Asked(10, 30, 20))
    monkeypatch.setattr(fetching, "QUIET_SECONDS", 0.2)
    with pytest.raises(fetching.Fault, match="no answer in 0 s"):
        fetch(Slow(skip_instance_cache=True), "/set/x", Asked(10, 30, 20))


def test_s3(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "QUIET_SECONDS", 20.0)
    (tmp_path / "x").write_bytes(DATA)
    with bucket(tmp_path) as url:
        assert Remote(url).part("x", 100, 300) == DATA[100:300]
        assert Remote(url).whole("x", 5000) == DATA
        with pytest.raises(ShardError, match="it has 4096 bytes and more are not read"):
            Remote(url).whole("x", 100)
        with pytest.raises(ShardError, match=f"cannot read {url}/x"):
            Remote(url).part("x", 5000, 5100)
        with pytest.raises(Missing):
            Remote(url).whole("y", 100)
