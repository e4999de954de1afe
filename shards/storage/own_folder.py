"""Folders that nobody else on this machine can change: found, or made, without following anybody else's links.

A name below /tmp, or in any folder that others can write, may have been taken by another user before us: a link of
theirs would have us read and overwrite what they like. So a path is walked folder by folder, each held open, and
everything on it has to belong to us or to root.
"""

import contextlib
import functools
import logging
import os
import stat
import tempfile
from pathlib import Path

from beitforge.shards.errors import ShardError

CACHE = "data.cache"  # the setting
_STEPS = 1000  # of a walk; links may lead in a circle
_OVERFLOW_UID = 65534  # whom a user namespace shows for everybody it does not map, root included
# file systems that nodes share: too slow for a cache, and small where homes are
_SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs", "9p", "panfs", "pvfs2", "wekafs")
_log = logging.getLogger(__name__)


class Unsafe(ShardError):
    """Others can change what is in a folder."""


class Folder:
    """An open folder: `number` is for dir_fd. Closed when it is forgotten."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)

    def inner(self, name: str, path: Path) -> "Folder":
        """A folder in it, made where it is missing; `path` is for messages. Raises Unsafe, OSError where it is a link
        or a file."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            found = Folder(os.open(name, flags, dir_fd=self.number))
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=self.number)
            found = Folder(os.open(name, flags, dir_fd=self.number))
        _check_own(os.fstat(found.number), path, CACHE)
        return found

    def file(self, name: str, flags: int) -> int:
        """The descriptor of a file in it, which is no link; a new one is ours alone to read and write."""
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600, dir_fd=self.number)

    def stat(self, name: str) -> os.stat_result:
        """Of what is in it under this name, a link too. Raises OSError."""
        return os.stat(name, dir_fd=self.number, follow_symlinks=False)

    def touch(self, name: str) -> None:
        """Make a file in it the latest used."""
        os.utime(name, dir_fd=self.number, follow_symlinks=False)

    def unlink(self, name: str) -> None:
        """Remove a file from it, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.number)

    def rename(self, name: str, to: str) -> None:
        """Give a file in it another name, in the place of what has it."""
        os.replace(name, to, src_dir_fd=self.number, dst_dir_fd=self.number)


def own_folder(path: Path, setting: str = CACHE) -> Folder:
    """The folder at `path`, made with mode 0700 where it is missing, as are those above it. setting: that says where it
    is, for messages.

    Raises Unsafe where it belongs to another user or others can write it, or where a folder above it, or a link on the
    way, belongs to somebody who is neither us nor root, or can be replaced by others; OSError where it cannot be made.
    """
    look = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    here, seen = Folder(os.open("/", look)), Path("/")
    waiting = [*reversed(Path(os.path.abspath(path)).parts[1:])]
    for _ in range(_STEPS):
        if not waiting:
            break
        name = waiting.pop()
        try:
            there = Folder(os.open(name, look, dir_fd=here.number))
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=here.number)
            waiting.append(name)
            continue
        found = os.fstat(there.number)
        if stat.S_ISLNK(found.st_mode):
            _check_above(found, seen / name, path, "link", setting)
            target = Path(os.readlink("", dir_fd=there.number))
            waiting += [*reversed(target.parts)]
            if target.is_absolute():
                here, seen = Folder(os.open(waiting.pop(), look)), Path("/")
            continue
        if waiting:
            _check_above(found, seen / name, path, "folder", setting)
        here, seen = there, seen / name
    else:
        raise ShardError(f"{path}: its links lead in a circle, or too far: set {setting} to another folder")
    opened = Folder(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here.number))
    _check_own(os.fstat(opened.number), path, setting)
    return opened


def _check_own(found: os.stat_result, path: Path, setting: str) -> None:
    if found.st_uid != os.getuid():
        raise Unsafe(
            f"{path} belongs to user {found.st_uid}, who could change what user {os.getuid()} reads there: set "
            f"{setting} to a folder of your own ({setting}=FOLDER)"
        )
    if found.st_mode & 0o022:
        raise Unsafe(
            f"{path} can be written by others (mode {stat.S_IMODE(found.st_mode):04o}), who could change what is read "
            f"there: set {setting} to a folder that only you can write ({setting}=FOLDER), or chmod -R go-w {path}"
        )


def _check_above(found: os.stat_result, at: Path, path: Path, what: str, setting: str) -> None:
    """A folder above, or a link on the way: of ours or root's, and not for others to write unless it is sticky."""
    cure = f"set {setting} to a folder that only you can replace ({setting}=FOLDER), not {path}"
    if found.st_uid not in (os.getuid(), *_roots()):
        raise Unsafe(f"the {what} {at} belongs to user {found.st_uid}, who could put another in its place: {cure}")
    if what == "folder" and found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        mode = stat.S_IMODE(found.st_mode)
        raise Unsafe(f"{at} can be written by others (mode {mode:04o}), who could replace what is in it: {cure}")


@functools.cache
def _roots() -> tuple[int, ...]:
    """Who counts as root: in a container's user namespace the machine's own root may have no number of its own."""
    try:
        whole = Path("/proc/self/uid_map").read_text(encoding="ascii").split() == ["0", "0", str(2**32 - 1)]
    except OSError:
        whole = True
    return (0,) if whole else (0, _OVERFLOW_UID)


@functools.cache
def default_folder(name: str = "shards", setting: str = CACHE) -> Path:
    """Where this user keeps what can be made again unless the setting says: in the user's own cache folder, or, where
    that is not to be had or nodes share it, in $TMPDIR, which is said in one line. Whether others have been there is
    for own_folder to say."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    own = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "beitforge" / name
    second = Path(tempfile.gettempdir()) / f"beitforge-{'cache' if name == 'shards' else name}-{os.getuid()}"
    try:
        if not own.is_absolute():
            raise OSError("this user has no home folder")
        folder = own_folder(own)
        shared = _shared_by_nodes(os.fstat(folder.number).st_dev)
        if shared:
            raise OSError(f"it is on {shared}, which nodes share")
        if not os.access(".", os.W_OK, dir_fd=folder.number):
            raise OSError("it cannot be written")
        return own
    except (OSError, Unsafe) as error:
        level = logging.WARNING if setting == CACHE else logging.INFO  # a hundred gigabytes, or a few files
        _log.log(level, "%s are kept in %s, not %s: %s; %s sets another", name, second, own, error, setting)
    return second


def _shared_by_nodes(device: int) -> str:
    """The kind of a file system that nodes share; empty for one of this machine, or where it cannot be known."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            words = line.split()
            if words[2] == number and (kind := words[words.index("-") + 1]) in _SHARED:
                return kind
    return ""
