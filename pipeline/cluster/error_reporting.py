"""Reports expected errors: one line, printed by exactly one rank. Must not know torch.

Expected are also the errors of a rank that another process's end has left alone: a rank that is gone, a loader worker
that was killed. torch raises them as RuntimeError, with the cause in the text only.
"""

import contextlib
import errno
import os
import re
import socket
import sys
from collections.abc import Iterator

from beitforge.pipeline.cluster.environment import rank_info, rank_of, under_srun
from beitforge.pipeline.errors import ConfigError, HostError, SharedError, one_line
from beitforge.shards.errors import ShardError

USER_ERRORS = (ConfigError, ShardError, OSError, RuntimeError)  # `user_message` tells which of the last two are
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM}  # full, or not ours
_DISK |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT}  # a path that leads where the user did not think
_DISK |= {errno.ELOOP, errno.ENAMETOOLONG}  # or nowhere


_RANKS = ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError")  # torch's
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_REASONS = re.compile(
    r"connection (?:closed|reset|refused|was likely closed)[^.\n[]*(?:\[[^]\n]*\](?::\d+)?)?|broken pipe|"
    r"timed out[^.\n]*|remote process exited[^.\n]*",
    re.IGNORECASE,
)
_RESUME = "start the same command again to resume"


class _Doing:
    what = "the start"


def doing(what: str) -> None:
    """What this process is at from now on, for the line it says when another process's end has ended it."""
    _Doing.what = what


def user_message(error: BaseException) -> str:
    """The line for an error that a user, a shard or a disk caused; '' for one that nobody expects."""
    if isinstance(error, ConfigError | ShardError):
        return one_line(str(error))
    if isinstance(error, OSError) and error.errno in _DISK:
        return one_line(f"{error.filename or 'a file'}: {error.strerror}; fix this and rerun")
    return _left_alone(error) if isinstance(error, RuntimeError) else ""


def _left_alone(error: RuntimeError) -> str:
    """The line of an error that the end of another process caused; '' for any other."""
    text = str(error)
    if worker := re.match(r"DataLoader worker \(pids?\(?s?\)? ?([\d, ]+)\)(?: (?:is|are))? ?([^.]*)", text):
        return (
            f"loader worker {worker[1]} ended at {_Doing.what} ({' '.join(worker[2].split())}): if memory was short "
            f"(dmesg says so), lower loader.workers or loader.prefetch; {_RESUME}"
        )
    if type(error).__name__ not in _RANKS and "gloo/" not in text:
        return ""
    if _PORT_TAKEN.search(text):
        port = os.environ.get("MASTER_PORT", "")
        return (
            f"MASTER_PORT {port} on {socket.gethostname()} is in use by another process (a second job here?): choose a "
            f"free one (--master_port of the launcher, or MASTER_PORT)"
        )
    reason = (_REASONS.search(text) or [text.splitlines()[0][:120]])[0].strip()
    return f"lost another rank at {_Doing.what} ({reason}): the line of the rank that ended first says why; {_RESUME}"


def report(error: BaseException) -> int:
    """Say the line of an error on stderr, unless another process does, and return the exit code: 2, or 1 for what the
    end of another process has caused.

    A SharedError is said by the first rank, a HostError by the first rank of its host. Anything else one rank may meet
    alone: each says its own.
    """
    rank, line = _rank(), user_message(error)
    if isinstance(error, HostError):
        says = _local_rank() == "0"
    else:
        says = rank == 0 or not isinstance(error, SharedError)
        alone = rank == 0 and not (isinstance(error, RuntimeError) and rank_info(os.environ).size > 1)
        line = line if alone else f"rank {rank} on {socket.gethostname()}: {line}"
    if says:
        print(f"error: {line}", file=sys.stderr, flush=True)
    return 1 if isinstance(error, RuntimeError) else 2


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
