"""Every file below a folder, each by one name, whatever links lead there."""

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from beitforge.shards.errors import ShardError

_MOST_KINDS = 50
_DEEPEST = 200  # folders in one another


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


class Walk:
    """Every file below a folder, each by one name: its own where it lies in the folder, else that of the first link.

    `left_out` are the links, and the folders met again behind links, whose files have such a name already, each with
    that name. `passed` counts what is hidden, and what is neither file nor folder. `top` are the folders, links to
    folders among them, that lie in the root itself.
    """

    def __init__(self, root: Path, leave_out: Path):
        self.root, self.leave_out = root, leave_out
        self.left_out: list[tuple[str, str]] = []
        self.passed = Tally()
        self.top: list[str] = []
        self._folders: dict[tuple[int, int], str] = {}  # device and inode: relative path
        self._linked: dict[tuple[int, int], str] = {}  # of files that links led to

    def files(self) -> Iterator[tuple[str, os.stat_result | None]]:
        """Relative path and status of each; None for a link that leads nowhere."""
        links: list[str] = []
        yield from self._below("", links)
        for path in links:  # after all that lies in the folder, so that a link never takes the place of it
            yield from self._link(path)
        self.left_out.sort()

    def _below(self, prefix: str, links: list[str]) -> Iterator[tuple[str, os.stat_result | None]]:
        """Files of a folder and those below. Links are added to `links`."""
        folder = self.root / prefix
        if prefix.count("/") > _DEEPEST:
            raise ShardError(f"{folder} lies more than {_DEEPEST} folders deep: move what is in it")
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if folder.resolve() == self.leave_out:
            return
        if here in self._folders:
            self._leave_out(prefix, self._folders[here])
            return
        self._folders[here] = prefix
        if prefix.count("/") == 1:
            self.top.append(prefix[:-1])
        for entry in _listed(folder):
            path = f"{prefix}{entry.name}"
            if entry.name.startswith("."):
                self.passed.add("hidden", path)
            elif entry.is_symlink():
                links.append(path)
            elif entry.is_dir():
                yield from self._below(f"{path}/", links)
            elif entry.is_file():
                yield path, _status(folder / entry.name)
            else:
                self.passed.add("neither file nor folder", path)

    def _link(self, path: str) -> Iterator[tuple[str, os.stat_result | None]]:
        """What a link leads to, unless it is taken already; links behind it likewise."""
        target, status = self.root / path, _status(self.root / path)
        if status is None:
            yield path, None
        elif stat.S_ISDIR(status.st_mode):
            links: list[str] = []
            yield from self._below(f"{path}/", links)
            for inner in links:
                yield from self._link(inner)
        elif taken := self._taken(target, status):
            self._leave_out(path, taken)
        elif stat.S_ISREG(status.st_mode):
            self._linked[status.st_dev, status.st_ino] = path
            yield path, status
        else:
            self.passed.add("neither file nor folder", path)

    def _taken(self, target: Path, status: os.stat_result) -> str:
        """By what name the file that a link leads to is taken already, or ''."""
        if (status.st_dev, status.st_ino) in self._linked:
            return self._linked[status.st_dev, status.st_ino]
        real = target.resolve()
        within = real.parent.stat()
        if (folder := self._folders.get((within.st_dev, within.st_ino))) is None or real.name.startswith("."):
            return ""
        return f"{folder}{real.name}"

    def _leave_out(self, path: str, taken: str) -> None:
        self.left_out.append((path.rstrip("/"), taken.rstrip("/") or "."))


def _listed(folder: Path) -> list[os.DirEntry]:
    """What a folder holds, in order."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except PermissionError as error:
        raise ShardError(f"{folder} cannot be listed ({error.strerror}): make it readable, or move it away") from error


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EACCES, errno.ENOTDIR):
            return None
        raise
