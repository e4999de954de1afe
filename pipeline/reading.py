"""Small files that others may have written: regular ones of bounded size, and JSON of bounded depth out of them.

A FIFO, a device or a socket in a file's place would keep its reader waiting for ever, a link may lead out of the folder
that was received, and a few bytes of JSON may nest beyond the interpreter's stack. Knows no run and no setting.
"""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from beitforge.pipeline.errors import ConfigError

SMALL = 4 << 20  # bytes of a file of settings, of an environment, of results
_DEPTH = 32  # of nested lists and objects
_DIGITS = 18  # of a whole number; a longer one is read as a float, which may be infinite
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class OddFile(ConfigError):
    """A file that is no regular one, is too large, or lies elsewhere than it seems."""


@contextlib.contextmanager
def open_regular(path: Path, within: Path | None = None) -> Iterator[BinaryIO]:
    """A regular file, open to read; anything else is refused before it is opened.

    within: the folder that the file must lie in once links are followed. Raises OddFile, and OSError as `open` does.
    """
    real = Path(os.path.realpath(path))
    if within is not None and not real.is_relative_to(os.path.realpath(within)):
        raise OddFile(f"{path} leads out of {within}, to {real}; it was not read: copy the file into the folder")
    try:
        before = os.stat(real)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OddFile(f"{path} is a link that leads in a circle: give a regular file") from error
    _refuse_odd(path, before)
    # it may be exchanged meanwhile: no link is followed any more, and nothing waits
    descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY)
    with open(descriptor, "rb") as file:
        _refuse_odd(path, os.fstat(descriptor))
        yield file


def _refuse_odd(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "no regular file")
        raise OddFile(f"{path} is {kind}: give a regular file")


def require_regular(path: Path) -> Path:
    """The path of a file that a library will open. Raises OddFile where that would wait for ever, or is a folder."""
    _refuse_odd(path, os.stat(path))
    return path


def read_regular(path: Path, at_most: int = SMALL, within: Path | None = None) -> bytes:
    """The content of a regular file. Raises as `open_regular`, and OddFile for more than `at_most` bytes."""
    with open_regular(path, within) as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise OddFile(f"{path} is larger than {at_most:,} bytes, the most that is read of it")
    return content


def read_text(path: Path, at_most: int = SMALL, within: Path | None = None) -> str:
    """As `read_regular`, of a UTF-8 text. Raises UnicodeDecodeError (a ValueError) where it is none."""
    return read_regular(path, at_most, within).decode("utf-8")


def parse_json(text: bytes | str) -> Any:
    """What a JSON text holds. Whole numbers beyond 18 digits are floats; NaN and the infinities are taken.

    Raises ValueError for whatever is no JSON, and for more than 32 levels.
    """
    try:
        content = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError(f"it nests more than {_DEPTH} levels deep") from None
    refuse_deep(content)
    return content


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _DIGITS else float(digits)


def refuse_deep(content: object) -> None:
    """Raise ValueError where lists and objects nest more than 32 levels deep."""
    level = [content]
    for _ in range(_DEPTH + 1):
        level = [each for item in level for each in _inside(item)]
        if not level:
            return
    raise ValueError(f"it nests more than {_DEPTH} levels deep")


def _inside(item: object) -> list:
    inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return [each for each in inner if isinstance(each, dict | list)]


def read_object(path: Path, within: Path | None = None) -> dict:
    """The JSON object in a file. Raises OddFile, OSError, or ValueError where it holds no object."""
    content = parse_json(read_regular(path, within=within))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, no object")
    return content
