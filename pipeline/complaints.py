"""What a user, a shard or a disk caused, as one line, said once by whoever knows of it. Must not know torch."""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator

from pipeline.config import ConfigError, SharedError
from pipeline.rendezvous import HostError, in_step, place_of, rank_of
from shards.errors import ShardError

EXPECTED = (ConfigError, ShardError, OSError)  # `line_of` tells which OSErrors are
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM}  # full, or not ours
_DISK |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT}  # a path that leads where the user did not think


def line_of(error: BaseException) -> str:
    """The line for an error that a user, a shard or a disk caused; '' for one that nobody expects."""
    if isinstance(error, ConfigError | ShardError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"{error.filename or 'a file'}: {error.strerror}; mend that, then run the same command again"
    return ""


def complain(error: BaseException) -> int:
    """Say the line of an error on stderr, unless another process does, and return the exit code.

    A SharedError is said by the first rank, a HostError by the first rank of its host. Anything else one rank may meet
    alone: each says its own.
    """
    rank, line = _rank(), line_of(error)
    if isinstance(error, HostError):
        says = _local_rank() == "0"
    else:
        says = rank == 0 or not isinstance(error, SharedError)
        line = line if rank == 0 else f"rank {rank} on {socket.gethostname()}: {line}"
    if says:
        print(f"error: {line}", file=sys.stderr, flush=True)
    return 2


@contextlib.contextmanager
def of_host() -> Iterator[None]:
    """Turn what a user, a shard or a disk causes into a HostError, which names the host where there are others."""
    try:
        yield
    except EXPECTED as error:
        if not (line := line_of(error)):
            raise
        place = place_of(os.environ)
        among = place.size > place.local_size
        raise HostError(f"host {socket.gethostname()}: {line}" if among else line) from error


def _rank() -> int:
    """0 too where the environment says nonsense, which is then the error."""
    try:
        return rank_of(os.environ)
    except ConfigError:
        return 0


def _local_rank() -> str:
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0") if in_step(os.environ) else "0")
