"""Every file below a folder, each by one name, whatever links lead there."""

import contextlib
import errno
import os
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from beitforge.shards.errors import ShardError

_MOST_KINDS = 50
_DEEPEST = 200  # folders in one another
_BATCH = 1 << 14  # files of a folder whose names wait
_GONE = (errno.ENOENT, errno.ELOOP, errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG)
_NUL = "\0"

Facts = tuple[int, int]  # bytes, and the time of change in ns
Entry = tuple[str, str, Facts | None]  # name, and whether it is a link, folder, file or other


@dataclass
class PassedOver:
    """Files of one kind that were not taken: how many, and the first of them."""

    kind: str
    files: int
    first: str


class Tally:
    """What was passed over, by kind: a million side-car files are one line."""

    def __init__(self) -> None:
        self._kinds: dict[str, PassedOver] = {}

    def add(self, kind: str, path: str) -> None:
        if kind not in self._kinds and len(self._kinds) >= _MOST_KINDS:
            kind = "of other names"
        self._kinds.setdefault(kind, PassedOver(kind, 0, path)).files += 1

    def kinds(self) -> list[PassedOver]:
        """The commonest first."""
        return sorted(self._kinds.values(), key=lambda one: (-one.files, one.kind))


class Found:
    """Files as they are met: `paths`, a NUL behind each, `sizes` in bytes, `times` of change in ns, and the folder of
    each, as the number of files that each folder of `folders` brought in turn."""

    def __init__(self) -> None:
        self.paths = bytearray()
        self.sizes, self.times, self.counts = array("q"), array("q"), array("q")
        self.folders: list[str] = []

    def add(self, folder: str, names: list[str], sizes: list[int], times: list[int]) -> None:
        """Files of one folder ("a/b/", "" for the root)."""
        if names:
            self.paths += f"{folder}{f'{_NUL}{folder}'.join(names)}{_NUL}".encode("utf-8", "surrogateescape")
            self.sizes.extend(sizes)
            self.times.extend(times)
            self.counts.append(len(names))
            self.folders.append(folder)


class Walk:
    """Every file below a folder, each by one name: its own where it lies in the folder, else that of the first link.

    wanted: of an extension with its dot ("" for none), as it stands in a name, whether files of it are wanted. These
    are `found`, in any order, the others `unknown`. `left_out` are the links, and the folders met again behind links,
    whose files have such a name already, each with that name. `passed` counts what is hidden, links that lead nowhere,
    and what is neither file nor folder. `top` are the folders, links to folders among them, that lie in the root.
    """

    def __init__(self, root: Path, leave_out: Path, wanted: Callable[[str], bool]):
        self.root, self.wanted = root, wanted
        self.found, self.unknown = Found(), Found()
        self.left_out: list[tuple[str, str]] = []
        self.passed = Tally()
        self.top: list[str] = []
        self._folders: dict[tuple[int, int], str] = {}  # device and inode: relative path
        self._linked: dict[tuple[int, int], str] = {}  # of files that links led to
        self._named: dict[tuple[int, int, str], str] = {}  # of the same, by their folders and own names
        out = _status(leave_out)
        self._leave = (out.st_dev, out.st_ino) if out else None
        links: list[str] = []
        self._below("", links)
        for path in links:  # after all that lies in the folder, so that a link never takes the place of it
            self._link(path)
        self.left_out.sort()

    def _below(self, prefix: str, links: list[str]) -> None:
        """Take the files of a folder and of those below. Links are added to `links`."""
        folder = self.root / prefix
        if prefix.count("/") > _DEEPEST:
            raise ShardError(f"{folder} lies more than {_DEEPEST} folders deep: move what is in it")
        status = _looked_at(folder)
        here = (status.st_dev, status.st_ino)
        if here == self._leave:
            return
        if here in self._folders:
            self._leave_out(prefix, self._folders[here])
            return
        self._folders[here] = prefix
        if prefix.count("/") == 1:
            self.top.append(prefix[:-1])
        for name, kind, facts in self._take_wanted(folder, prefix, here):
            path = f"{prefix}{name}"
            if name.startswith("."):
                self.passed.add("hidden", path)
            elif kind == "link":
                links.append(path)
            elif kind == "folder":
                self._below(f"{path}/", links)
            elif kind == "file":
                self._file(path, facts)
            else:
                self.passed.add("neither file nor folder", path)

    def _take_wanted(self, folder: Path, prefix: str, here: tuple[int, int]) -> list[Entry]:
        """Take the files of a folder that are wanted by name, unless a link has led to them before. The rest of what it
        holds, in order."""
        rest: list[Entry] = []
        names: list[str] = []
        sizes: list[int] = []
        times: list[int] = []
        last = "/"  # the extension met last; at first what no name ends with
        with _opened(folder) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == "." or not entry.is_file(follow_symlinks=False):
                    rest.append((name, _kind(entry), None))
                    continue
                if self._named and (taken := self._named.get((*here, name))):
                    self._leave_out(f"{prefix}{name}", taken)
                    continue
                if not name.endswith(last):
                    extension = os.path.splitext(name)[1]
                    if not self.wanted(extension):
                        rest.append((name, "file", _facts(entry)))
                        continue
                    last = extension
                size, time = _facts(entry) or (0, 0)
                names.append(name)
                sizes.append(size)
                times.append(time)
                if len(names) == _BATCH:
                    self.found.add(prefix, names, sizes, times)
                    names, sizes, times = [], [], []
        self.found.add(prefix, names, sizes, times)
        return sorted(rest, key=itemgetter(0))

    def _file(self, path: str, facts: Facts | None) -> None:
        """Take a file, or a link to one, of these facts; None where it leads nowhere."""
        folder, slash, name = path.rpartition("/")
        wanted = self.wanted(os.path.splitext(name)[1])
        if facts is None and not wanted:
            self.passed.add("a link that leads nowhere", path)
            return
        size, time = facts or (0, 0)
        (self.found if wanted else self.unknown).add(folder + slash, [name], [size], [time])

    def _link(self, path: str) -> None:
        """Take what a link leads to, unless it is taken already; links behind it likewise."""
        target, status = self.root / path, _status(self.root / path)
        if status is None:
            self._file(path, None)
        elif stat.S_ISDIR(status.st_mode):
            links: list[str] = []
            self._below(f"{path}/", links)
            for inner in links:
                self._link(inner)
        elif taken := self._taken(target, status):
            self._leave_out(path, taken)
        elif stat.S_ISREG(status.st_mode):
            self._linked[status.st_dev, status.st_ino] = path
            if (place := _place(target)) is not None:
                self._named[place] = path
            self._file(path, (status.st_size, status.st_mtime_ns))
        else:
            self.passed.add("neither file nor folder", path)

    def _taken(self, target: Path, status: os.stat_result) -> str:
        """By what name the file that a link leads to is taken already, or ''."""
        if (status.st_dev, status.st_ino) in self._linked:
            return self._linked[status.st_dev, status.st_ino]
        if (place := _place(target)) is None:
            return ""
        device, inode, name = place
        folder = self._folders.get((device, inode))
        return "" if folder is None or name.startswith(".") else f"{folder}{name}"

    def _leave_out(self, path: str, taken: str) -> None:
        self.left_out.append((path.rstrip("/"), taken.rstrip("/") or "."))


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
    """What a folder holds, which is looked at by the folder's descriptor: without the way to it each time."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError as error:
        raise ShardError(f"{folder} cannot be listed ({error.strerror}): make it readable, or move it away") from error
    try:
        with os.scandir(descriptor) as entries:
            yield entries
    finally:
        os.close(descriptor)


def _place(link: Path) -> tuple[int, int, str] | None:
    """Device and inode of the folder in which lies what a link leads to, and its name there; None where that cannot be
    known."""
    real = link.resolve()
    within = _status(real.parent)
    return (within.st_dev, within.st_ino, real.name) if within else None


def _looked_at(folder: Path) -> os.stat_result:
    try:
        return os.stat(folder)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise _too_long(folder) from error
        raise


def _too_long(folder: Path) -> ShardError:
    return ShardError(f"{folder} has a longer path than the system takes (4095 bytes): move what is in it further up")


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "link"
    return "folder" if entry.is_dir(follow_symlinks=False) else "other"


def _facts(entry: os.DirEntry[str]) -> Facts | None:
    """Of a file that is no link; None where it is gone, or cannot be looked at."""
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
    return status.st_size, status.st_mtime_ns


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
