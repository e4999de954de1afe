"""`watch RUN`: the progress of a run, as a page in a browser or in this terminal; read from its folder alone."""

import argparse
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from beitforge.pipeline.errors import ConfigError

if TYPE_CHECKING:
    from beitforge.pipeline.watch.server import Server

HELP = "show the progress of a run, in a browser or in this terminal"
_REDRAW_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and how to show it."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder; it need not exist yet")
    text = "address to listen on (default 127.0.0.1: only this machine can open the page)"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    text = "port to listen on (default 8265; 0: any free one)"
    parser.add_argument("--port", type=int, default=8265, metavar="PORT", help=text)
    text = "also read the sets and the tokenizer that RUN's config names, for images; for a run you trust"
    parser.add_argument("--data", action="store_true", help=text)
    parser.add_argument("--terminal", action="store_true", help="show numbers in this terminal instead, for ssh")


def run(arguments: argparse.Namespace) -> int:
    """Serve or draw until Ctrl-C. Raises ConfigError where RUN is no folder, or the port cannot be used."""
    folder = arguments.run
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: give the run's folder (train.run of its config)")
    return _draw(folder) if arguments.terminal else _serve(folder, arguments.host, arguments.port, arguments.data)


def _serve(folder: Path, host: str, port: int, data: bool) -> int:
    from beitforge.pipeline.watch.server import Server
    from beitforge.pipeline.watch.site import Site

    site = Site(folder, data)
    server = Server(host, port, site.page, site.live)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _say_where(folder, host, server)
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        site.background.stop()
    return 0


def _say_where(folder: Path, host: str, server: "Server") -> None:
    print(f"watching {folder} at {server.url} (Ctrl-C ends it)", flush=True)
    if server.is_public:
        print(f"anyone who reaches {server.host} can read it", flush=True)
    else:
        there = f"{server.server_port}:{host}:{server.server_port}"
        print(f"from another machine: ssh -L {there} {socket.gethostname()}, then open the same address", flush=True)


def _draw(folder: Path) -> int:
    from beitforge.pipeline.runs.status import Follower
    from beitforge.pipeline.watch import terminal

    follower, plain = Follower(folder), not _can_write("█▁·")

    def draw(columns: int) -> list[str]:
        follower.refresh()
        return terminal.render(follower, columns, plain)

    terminal.show(draw, _REDRAW_SECONDS)
    return 0


def _can_write(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
