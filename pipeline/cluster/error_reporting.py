"""Reports expected errors: one line, printed by exactly one rank. Must not know torch."""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator

from beitforge.pipeline.cluster.environment import rank_info, rank_of, under_srun
from beitforge.pipeline.errors import ConfigError, HostError, SharedError, one_line
from beitforge.shards.errors import ShardError

USER_ERRORS = (ConfigError, ShardError, OSError)  # `line_of` tells which OSErrors are
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM}  # full, or not ours
_DISK |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT}  # a path that leads where the user did not think


def user_message(error: BaseException) -> str:
    """The line for an error that a user, a shard or a disk caused; '' for one that nobody expects."""
    if isinstance(error, ConfigError | ShardError):
        return one_line(str(error))
    if isinstance(error, OSError) and error.errno in _DISK:
        return one_line(f"{error.filename or 'a file'}: {error.strerror}; fix this and rerun")
    return ""


def report(error: BaseException) -> int:
    """Say the line of an error on stderr, unless another process does, and return the exit code.

    A SharedError is said by the first rank, a HostError by the first rank of its host. Anything else one rank may meet
    alone: each says its own.
    """
    rank, line = _rank(), user_message(error)
    if isinstance(error, HostError):
        says = _local_rank() == "0"
    else:
        says = rank == 0 or not isinstance(error, SharedError)
        line = line if rank == 0 else f"rank {rank} on {socket.gethostname()}: {line}"
    if says:
        print(f"error: {line}", file=sys.stderr, flush=True)
    return 2


@contextlib.contextmanager
def as_host_error() -> Iterator[None]:
    """Turn what a user, a shard or a disk causes into a HostError, which names the host where there are others."""
    try:
        yield
    except USER_ERRORS as error:
        if not (line := user_message(error)):
            raise
        place = rank_info(os.environ)
        among = place.size > place.local_size
        raise HostError(f"host {socket.gethostname()}: {line}" if among else line) from error


def _rank() -> int:
    """0 too where the environment says nonsense, which is then the error."""
    try:
        return rank_of(os.environ)
    except ConfigError:
        return 0


def _local_rank() -> str:
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0") if under_srun(os.environ) else "0")
