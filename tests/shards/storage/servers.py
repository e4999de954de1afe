"""Shards behind a network: a folder served over HTTP or as S3, and a proxy that misbehaves on purpose.

Each server is a process of its own, so that a test which forks hands no listening socket to its children. It says its
port on standard output once it listens, and ends with its standard input: also when the tests are killed.
"""

import asyncio
import contextlib
import dataclasses
import faulthandler
import http.client
import json
import logging
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

_LOCAL = "127.0.0.1"
_START_SECONDS = 60
_BODY_FAULTS = ("reset", "slow", "truncate", "shorten", "corrupt")
_HOP_BY_HOP = (
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "expect",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faults:
    """How a proxy misbehaves: probabilities per request, which meets one fault at most, so they sum to 1 or less."""

    seed: int
    error: float = 0.0  # 500 or 503 at once, the upstream not asked
    reset: float = 0.0  # RST after half of the body
    slow: float = 0.0  # `pause_seconds` without a byte after half of the body
    truncate: float = 0.0  # a clean end of the connection after half of the body that Content-Length promised
    shorten: float = 0.0  # half of what was asked for, and the headers agree: only the asker can tell
    corrupt: float = 0.0  # one byte of the body is another; of the same bytes of a path not twice running
    pause_seconds: float = 0.3
    latency: tuple[float, float] = (0.0, 0.0)  # seconds before any answer: their mean, and how far from it they may be

    def __post_init__(self) -> None:
        total = self.error + sum(getattr(self, kind) for kind in _BODY_FAULTS)
        if total > 1 + 1e-9:
            raise ValueError(f"{self}: the probabilities sum to {total:g}; at most 1")

    def late(self, chance: random.Random) -> float:
        """Seconds that a request waits."""
        mean, spread = self.latency
        return chance.uniform(mean - spread, mean + spread) if mean else 0.0

    def drawn(self, chance: random.Random) -> str:
        """The fault a request meets, or ''."""
        rest = chance.random()
        for kind in ("error", *_BODY_FAULTS):
            rest -= getattr(self, kind)
            if rest < 0:
                return kind
        return ""


@contextlib.contextmanager
def http_server(folder: Path) -> Iterator[str]:
    """The URL under which the files of `folder` are served, ranges and listings too."""
    with _process("files", str(folder)) as (port, _):
        yield f"http://{_LOCAL}:{port}"


@contextlib.contextmanager
def s3_server(folder: Path, bucket: str) -> Iterator[str]:
    """The endpoint of an S3 whose `bucket` holds the files that `folder` holds now, under their relative names."""
    with _process("s3", str(folder), bucket) as (port, _):
        yield f"http://{_LOCAL}:{port}"


@contextlib.contextmanager
def faulty(upstream: str, faults: Faults) -> Iterator[tuple[str, Callable[[], dict[str, int]]]]:
    """A URL (or endpoint) that answers as `upstream` does, with faults, and the counts so far.

    Counted are "requests" and, by its name, each fault injected: errors into GET and HEAD, the others into the body of
    a GET that succeeds with two bytes or more. What a request meets follows from the seed and from its number. The
    counts can still be read afterwards.
    """
    with _process("faulty", upstream, json.dumps(dataclasses.asdict(faults))) as (port, counts):
        yield f"http://{_LOCAL}:{port}", counts


@contextlib.contextmanager
def _process(*words: str) -> Iterator[tuple[int, Callable[[], dict[str, int]]]]:
    """A server's process, its port and what it counts."""
    ours = {name: v for name, v in os.environ.items() if not name.upper().startswith("AWS_")}
    ours = {name: v for name, v in ours.items() if not name.upper().endswith("_PROXY")}
    command = [sys.executable, __file__, *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=ours, stdin=pipe, stdout=pipe, text=True) as process:
        last: dict[str, int] = {}

        def counts() -> dict[str, int]:
            if process.poll() is None:
                assert process.stdin is not None and process.stdout is not None
                print("counts", file=process.stdin, flush=True)
                last.update(json.loads(process.stdout.readline()))
            return dict(last)

        try:
            assert process.stdout is not None
            port = process.stdout.readline()
            if not port:
                raise RuntimeError(f"{words}: the server did not start; its standard error says why")
            yield int(port), counts
            counts()
        finally:
            process.terminate()


def _stay(port: int, counts: dict[str, int]) -> None:
    """The life of a server's process: say the port, then the counts whenever asked, until nobody can ask any more."""
    faulthandler.cancel_dump_traceback_later()
    print(port, flush=True)
    for _ in sys.stdin:
        print(json.dumps(counts), flush=True)


async def _serve_files(folder: str) -> None:
    from aiohttp import web

    application = web.Application()
    application.router.add_static("/", folder, show_index=True)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, _LOCAL, 0).start()
    await asyncio.to_thread(_stay, runner.addresses[0][1], {})


def _serve_s3(folder: str, bucket: str) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line per request
    server = ThreadedMotoServer(_LOCAL, 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    secret = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{_LOCAL}:{port}", **secret)
    client.create_bucket(Bucket=bucket)
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            client.upload_file(str(path), bucket, path.relative_to(folder).as_posix())
    _stay(port, {})


def _serve_faults(upstream: str, faults: str) -> None:
    proxy = _Proxy(upstream, Faults(**json.loads(faults)))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    _stay(proxy.server_address[1], proxy.counts)


class _Proxy(ThreadingHTTPServer):
    """What the handlers of all requests share."""

    request_queue_size = 128  # the default of 5 turns many connections at once into pauses of a second

    def __init__(self, upstream: str, faults: Faults):
        super().__init__((_LOCAL, 0), _Forward)
        self.upstream = urlsplit(upstream).netloc
        self.faults = faults
        self.counts = dict.fromkeys(("requests", "error", *_BODY_FAULTS), 0)
        self._lock = threading.Lock()
        self._corrupted: set[str] = set()

    def corrupts(self, asked: str) -> bool:
        """Whether an answer to what is asked may be corrupted: not after one that was, then again."""
        with self._lock:
            again = asked in self._corrupted
            (self._corrupted.discard if again else self._corrupted.add)(asked)
            return not again

    def count(self, what: str) -> int:
        """How many there are with this one."""
        with self._lock:
            self.counts[what] += 1
            return self.counts[what]


class _Response(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""


class _Forward(BaseHTTPRequestHandler):
    """One request, asked upstream and answered; then the connection is closed."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Proxy

    def do_GET(self) -> None:
        chance = random.Random(f"{self.server.faults.seed} {self.server.count('requests')}")
        fault = self.server.faults.drawn(chance)
        time.sleep(self.server.faults.late(chance))
        if fault == "corrupt" and not self.server.corrupts(f"{self.path} {self.headers.get('Range')}"):
            fault = ""
        with contextlib.suppress(ConnectionError):  # the client has had enough
            if fault == "error" and self.command in ("GET", "HEAD"):
                self.server.count(fault)
                self._answer(_Response(chance.choice((500, 503)), [("Content-Length", "0")]))
                return
            response = self._ask_upstream()
            if fault in _BODY_FAULTS and self.command == "GET" and response.status < 300 and len(response.body) > 1:
                self.server.count(fault)
                self._answer_badly(response, fault, chance)
            else:
                self._answer(response)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def _ask_upstream(self) -> _Response:
        """What the upstream says; 502 where it does not answer."""
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with contextlib.closing(http.client.HTTPConnection(self.server.upstream, timeout=60)) as connection:
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in _end_to_end(self.headers.items()):
                    connection.putheader(name, value)
                connection.endheaders(sent or None)
                response = connection.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException):
                return _Response(502, [("Content-Length", "0")])
            headers = _end_to_end(response.getheaders())
        return _Response(response.status, _sized(headers, len(body)) if body else headers, body)

    def _answer(self, response: _Response) -> None:
        self.send_response_only(response.status)
        for name, value in response.headers:
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(response.body)

    def _answer_badly(self, response: _Response, fault: str, chance: random.Random) -> None:
        body = response.body
        half = len(body) // 2
        if fault == "corrupt":
            place = chance.randrange(len(body))
            self._answer(response._replace(body=body[:place] + bytes([body[place] ^ 0xFF]) + body[place + 1 :]))
        elif fault == "shorten":
            self._answer(_Response(response.status, _sized(response.headers, half), body[:half]))
        else:
            self._answer(response._replace(body=body[:half]))
            if fault == "slow":
                time.sleep(self.server.faults.pause_seconds)
                self.wfile.write(body[half:])
            elif fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()  # holds the connection open
                self.connection.close()  # before http.server ends it cleanly

    def log_message(self, format: str, *words: object) -> None:
        """Not a line per request."""


def _end_to_end(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The headers that are not about one connection only."""
    return [(name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP]


def _sized(headers: list[tuple[str, str]], length: int) -> list[tuple[str, str]]:
    """The headers of a body of `length` bytes, which starts where it did."""
    sized = []
    for name, value in headers:
        if name.lower() == "content-range":
            start = int(value.removeprefix("bytes ").partition("-")[0])
            sized.append((name, f"bytes {start}-{start + length - 1}/{value.partition('/')[2]}"))
        elif name.lower() != "content-length":
            sized.append((name, value))
    return [*sized, ("Content-Length", str(length))]


def main(kind: str, words: list[str]) -> None:
    """One server. Where it hangs is said if it is not up in time; Ctrl-C is the parent's, who then ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.dump_traceback_later(_START_SECONDS, exit=True)
    if kind == "files":
        asyncio.run(_serve_files(*words))
    elif kind == "s3":
        _serve_s3(*words)
    else:
        _serve_faults(*words)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
