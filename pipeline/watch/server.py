"""A page and what is new in it, over HTTP, for one person: nothing can be sent to the server, and little asked of it.

Must not know runs, torch or any stage.
"""

import contextlib
import errno
import gzip
import ipaddress
import json
import socket
import socketserver
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from beitforge.pipeline.errors import ConfigError

# What a browser may do with the page: its own script and style, images in it, and asking this server.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_HERE = {"localhost", "127.0.0.1", "::1"}
_QUERY = 200  # characters of a query that are looked at
_MOST = 64  # connections at a time
_REQUEST_SECONDS = 60.0  # from one answer's end to the next one's; a browser that asks again opens a new connection
_SMALL = 1000  # bytes that are not worth compressing


class Server(ThreadingHTTPServer):
    """`page()` at /, `live(stamp)` as JSON at /live?since=STAMP. It listens when made; `serve_forever` answers."""

    daemon_threads = True

    def __init__(self, host: str, port: int, page: Callable[[], str], live: Callable[[str], dict]):
        """port 0: any free one. Raises ConfigError when it cannot listen there."""
        self.page, self.live, self.host = page, live, host
        if not 0 <= port <= 65535:
            raise ConfigError(f"--port is {port}: give one of 1 to 65535, or 0 for any free one")
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.address_family = family
            super().__init__((str(address[0]), port), Handler)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} port {port}: {_why(error, port)}") from error

        names = (socket.gethostname(), socket.getfqdn()) if self.is_public else ()
        self._names = {name.lower() for name in names}
        self._until: dict[socket.socket, float] = {}  # of each connection, on the monotonic clock

    def server_bind(self) -> None:
        """As TCPServer does it: HTTPServer also asks for this machine's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own; one connection too many is closed."""
        if len(self._until) >= _MOST:
            self.shutdown_request(request)
            return
        self.allow(request)
        super().process_request(request, client_address)

    def allow(self, connection: socket.socket) -> None:
        """A connection may last as long as a request may take from now on, however slowly it is sent or read."""
        self._until[connection] = time.monotonic() + _REQUEST_SECONDS

    def shutdown_request(self, request: Any) -> None:
        """The connection ends."""
        self._until.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called a few times a second: end what takes too long."""
        now = time.monotonic()
        for connection in [each for each, until in list(self._until.items()) if until < now]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A line, not a traceback: what a request asks for is not ours."""
        print(f"a request could not be answered: {sys.exc_info()[1]!r:.200}", file=sys.stderr, flush=True)

    @property
    def url(self) -> str:
        """As it is opened on this machine."""
        address = str(self.server_address[0])
        if ipaddress.ip_address(address).is_unspecified:
            address = socket.gethostname()
        return f"http://{f'[{address}]' if ':' in address else address}:{self.server_port}/"

    @property
    def is_public(self) -> bool:
        """Whether other machines reach it."""
        return not ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def is_own_hostname(self, host: str) -> bool:
        """Whether a Host header names this server. A page of elsewhere whose name was made to point here (DNS
        rebinding) names its own."""
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        if name in _HERE or name in (self.host.lower(), str(self.server_address[0])):
            return True
        if not self.is_public:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True


def _why(error: OSError, port: int) -> str:
    if isinstance(error, socket.gaierror):
        return "there is no such host; --host takes a name or an address of this machine"
    if error.errno == errno.EADDRINUSE:
        return f"something else listens there (another watch?): give another --port, such as {port + 1}, or 0 for any"
    if error.errno == errno.EADDRNOTAVAIL:
        return "that is no address of this machine; 127.0.0.1 is, and 0.0.0.0 stands for all it has"
    return f"{error.strerror}; give another --port, or 0 for any free one"


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "beitforge", ""
    timeout = 60  # seconds that a connection may be silent

    def handle(self) -> None:
        """Until the connection ends, however it does."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def handle_one_request(self) -> None:
        """The next request of a connection."""
        self.server.allow(self.connection)
        super().handle_one_request()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """A request that is no HTTP gets a line of text, like any other refusal."""
        self.request_version = self.protocol_version  # else no headers are sent
        for name, default in (("command", "GET"), ("headers", {})):
            if not getattr(self, name, None):
                setattr(self, name, default)
        self._refuse(code, "this is no request that a browser makes")

    def do_GET(self) -> None:
        """The page, what is new, or a refusal."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self._named(hosts[0]):
            return self._refuse(421, "this server answers to its own name alone: open the address that watch printed")
        try:
            parts = urlsplit(self.path)
        except ValueError:  # an unclosed bracket
            return self._refuse(400, "this is no address")
        if parts.path == "/":
            return self._answer(200, "text/html; charset=utf-8", self.server.page())
        if parts.path == "/live":
            since = parse_qs(parts.query[:_QUERY]).get("since", [""])[0]
            return self._answer(200, "application/json", json.dumps(self.server.live(since), separators=(",", ":")))
        return self._refuse(404, "there is / and nothing else here")

    do_HEAD = do_GET  # noqa: N815

    def _refuse_method(self) -> None:
        self._refuse(405, "GET and HEAD only", {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse_method  # noqa: N815

    def _named(self, host: str) -> bool:
        try:
            return self.server.is_own_hostname(host)
        except ValueError:  # no host at all, such as an unclosed bracket
            return False

    def _refuse(self, code: int, line: str, headers: dict[str, str] | None = None) -> None:
        self.close_connection = True
        self._answer(code, "text/plain; charset=utf-8", line + "\n", {"Connection": "close", **(headers or {})})

    def _answer(self, code: int, kind: str, text: str, headers: dict[str, str] | None = None) -> None:
        content, more = text.encode("utf-8", "backslashreplace"), dict(headers or {})
        if len(content) > _SMALL and "gzip" in self.headers.get("Accept-Encoding", ""):
            content = gzip.compress(content, 3)
            more["Content-Encoding"] = "gzip"
        self.send_response(code)
        for name, value in {**_HEADERS, **more}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Vary", "Accept-Encoding")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Not a line for every question."""
