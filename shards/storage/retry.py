"""Reading again after an error that may pass, with growing pauses: one rule for every place that bytes come from."""

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from beitforge.shards.errors import ShardError

Value = TypeVar("Value")

PAUSES = (0.2, 1.0, 5.0, 20.0)  # seconds before each further try
_LASTING = (errno.ENOENT, errno.EACCES, errno.EMFILE)


def lasting(error: Exception) -> bool:
    """Whether an I/O error of this machine will not pass by itself."""
    return isinstance(error, OSError) and error.errno in _LASTING


def retry(
    read: Callable[[], Value],
    what: str,
    cure: str = "check the storage, then start again",
    *,
    errors: type[Exception] = OSError,
    fatal: Callable[[Exception], bool] = lasting,
    spread: float = 0.0,
) -> Value:
    """The value of `read`, tried again after each of `errors` that is not `fatal`. Raises ShardError in the end:
    skipping what cannot be read would change the order. A ShardError of `read` itself is raised at once.

    spread: share of each pause that is added at random at most, so that many readers do not come back together.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except ShardError:
            raise
        except errors as error:
            if pause is None or fatal(error):
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ShardError(f"cannot read {what} ({reason[:300]}): {cure}") from error
            time.sleep(pause * random.uniform(1.0, 1.0 + spread) if spread else pause)
    raise AssertionError("unreachable")
