"""Reading again after an error that may pass: one rule for every place that bytes come from."""

import contextlib
import errno
import random
import socket
import time
from collections.abc import Callable
from typing import TypeVar

from beitforge.shards.errors import Damaged, ShardError

Value = TypeVar("Value")

PAUSES = (0.2, 1.0, 5.0, 20.0)  # seconds before each further try
LONGEST_PAUSE = 300.0  # seconds, whatever a server asks for
READS = 4  # of what comes damaged
_LASTING = (errno.ENOENT, errno.EACCES, errno.EMFILE)


class TryLater(Exception):
    """What failed may be tried again after `seconds`, no sooner."""

    def __init__(self, message: str, seconds: float):
        super().__init__(message)
        self.seconds = seconds


def lasting(error: Exception) -> bool:
    """Whether an I/O error of this machine will not pass by itself."""
    return isinstance(error, OSError) and error.errno in _LASTING


def retry(
    read: Callable[[], Value],
    what: str,
    cure: str = "check the storage, then start again",
    *,
    errors: type[Exception] | tuple[type[Exception], ...] = (OSError, EOFError),
    fatal: Callable[[Exception], bool] = lasting,
    spread: float = 0.0,
    brief: bool = False,
) -> Value:
    """The value of `read`, tried again after each of `errors` that is not `fatal`. Raises ShardError in the end:
    skipping what cannot be read would change the order. A ShardError of `read` itself is raised at once.

    spread: share of each pause that is added at random at most, so that many readers do not come back together.
    brief: whether to try only once more, for what can be done without.
    """
    for pause in (*(PAUSES[:1] if brief else PAUSES), None):
        try:
            return read()
        except ShardError:
            raise
        except errors as error:
            if pause is None or fatal(error):
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ShardError(f"host {socket.gethostname()} cannot read {what} ({reason[:300]}): {cure}") from error
            asked = min(error.seconds, LONGEST_PAUSE) if isinstance(error, TryLater) else 0.0
            time.sleep(max(pause, asked) * (random.uniform(1.0, 1.0 + spread) if spread else 1.0))
    raise AssertionError("unreachable")


def anew(read: Callable[[], Value], forget: Callable[[], object], what: Callable[[], str]) -> Value:
    """The value of `read`, tried again where it fails and where it finds what it reads Damaged, after `forget`, which
    has it open its files anew: they may have been replaced. Raises ShardError, which names this host and `what`, asked
    for only then."""

    try:
        return read()
    except (OSError, EOFError, Damaged):
        forget()

    def once() -> Value:
        try:
            return read()
        except (OSError, EOFError, Damaged):
            forget()
            raise

    try:
        return retry(lambda: reread(once), what())
    except Damaged as error:
        raise Damaged(f"{error} (seen on host {socket.gethostname()})") from error


def reread(read: Callable[[], Value], afresh: Callable[[], object] | None = None) -> Value:
    """The value of `read`, made again at once while it finds what it reads Damaged; what it finds at last is believed.

    afresh: called in between, for the next read to come from the disk.
    """
    try:
        return read()
    except Damaged:
        for _ in range(READS - 2):
            with contextlib.suppress(Damaged):
                if afresh is not None:
                    afresh()
                return read()
    if afresh is not None:
        afresh()
    return read()
