"""Reading again after an I/O error, with growing pauses: one rule for every place that bytes come from."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from beitforge.shards.errors import ShardError
from beitforge.shards.storage.files import RETRY_SECONDS

Value = TypeVar("Value")


def retry(read: Callable[[], Value], what: str) -> Value:
    """Run `read`; on an I/O error try again with growing pauses, then give up: skipping would change the order."""
    for pause in (*RETRY_SECONDS, None):
        try:
            return read()
        except OSError as error:
            if pause is None or error.errno in (errno.ENOENT, errno.EACCES, errno.EMFILE):
                raise ShardError(f"cannot read {what}: {error}; check the storage, then start again") from error
            time.sleep(pause)
    raise AssertionError("unreachable")
