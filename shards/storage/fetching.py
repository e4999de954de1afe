"""One request to a store, bounded by what was asked for: no more bytes, no other bytes, at no less than a least speed.

A server may be slow, wrong, or never come to an end. What it answers is checked before its body is read, as far as the
protocol says what it is: of HTTP and S3 the status, the range and the encoding; of fsspec's other stores the length.
"""

import asyncio
import email.utils
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from beitforge.shards.storage.retry import TryLater

Value = TypeVar("Value")

QUIET_SECONDS = 60.0  # for a connection and its answer's headers; and that nothing may come between two pieces
LEAST_SPEED = float(16 << 10)  # bytes a second over those seconds
_PIECE = 1 << 18
_RECOVERS = (408, 425, 429)  # of the statuses that blame the request, those that another try may not meet


class Refused(Exception):
    """The store will give the same answer again."""


class Fault(Exception):
    """The store's answer is not one to what it was asked."""


@dataclass(frozen=True)
class Asked:
    """Bytes start … stop - 1 of a file, all of them; or, where stop is None, all of a file of at most `most`."""

    start: int
    stop: int | None
    most: int

    @property
    def header(self) -> dict[str, str]:
        return {} if self.stop is None else {"Range": f"bytes={self.start}-{self.stop - 1}"}

    def seconds(self, size: int) -> float:
        """How long `size` bytes may take."""
        return QUIET_SECONDS + size / LEAST_SPEED

    def check_length(self, length: int) -> None:
        """Raises Fault unless this number of bytes can be the answer."""
        if self.stop is not None and length != self.stop - self.start:
            raise Fault(f"bytes {self.start} to {self.stop} were asked for, {length} came")
        if length > self.most:
            raise Fault(f"it has {length} bytes and more are not read of such a file than {self.most}")


def fetch(system: Any, path: str, asked: Asked) -> bytes:
    """What was asked for of a path of an fsspec file system. Raises FileNotFoundError, PermissionError or Refused where
    it would be the same again; Fault, TryLater, and whatever a store's library raises, where not."""
    from fsspec.asyn import AsyncFileSystem, sync
    from fsspec.implementations.http import HTTPFileSystem

    if asked.start == asked.stop:
        return b""
    if isinstance(system, HTTPFileSystem):
        data = sync(system.loop, _over_http, system, path, asked)
    elif hasattr(system, "_call_s3"):
        data = sync(system.loop, _from_s3, system, path, asked)
    elif isinstance(system, AsyncFileSystem):
        data = sync(system.loop, _from_another, system, path, asked)
    else:
        data = _in_time(lambda: _from_a_blocking(system, path, asked), asked.seconds(asked.most))
    asked.check_length(len(data))
    return data


async def _over_http(system: Any, path: str, asked: Asked) -> bytes:
    import aiohttp

    words = dict(system.kwargs)
    words["headers"] = {**words.get("headers", {}), **asked.header}
    session = await system.set_session()
    try:
        response = await _soon(session.get(system.encode_url(path), **words))
    except aiohttp.TooManyRedirects as error:
        raise Fault("it redirects again and again") from error
    try:
        _check_answer(response.status, {name.lower(): value for name, value in response.headers.items()}, asked)
        return await _body(response.content.iter_chunked(_PIECE), asked)
    finally:
        response.close()


async def _from_s3(system: Any, path: str, asked: Asked) -> bytes:
    bucket, key, version = system.split_path(path)
    words = {"VersionId": version} if version else {}
    answer = await _soon(system._call_s3("get_object", Bucket=bucket, Key=key, **words, **asked.header))
    try:
        about = answer["ResponseMetadata"]
        headers = {name.lower(): value for name, value in about.get("HTTPHeaders", {}).items()}
        _check_answer(about["HTTPStatusCode"], headers, asked)
        return await _body(_pieces(answer["Body"]), asked)
    finally:
        answer["Body"].close()


async def _pieces(body: Any) -> AsyncIterator[bytes]:
    while piece := await body.read(_PIECE):
        yield piece


async def _from_another(system: Any, path: str, asked: Asked) -> bytes:
    start, stop = asked.start, asked.stop
    if stop is None:
        stop = _size(await _soon(system._info(path)), asked)
    return await _soon(system._cat_file(path, start=start, end=stop), asked.seconds(stop - start))


def _from_a_blocking(system: Any, path: str, asked: Asked) -> bytes:
    stop = _size(system.info(path), asked) if asked.stop is None else asked.stop
    return system.cat_file(path, start=asked.start, end=stop)


def _size(info: Mapping[str, Any], asked: Asked) -> int:
    """A whole file's bytes, or one more than may come where the store does not say."""
    size = info.get("size")
    if size is None:
        return asked.most + 1
    asked.check_length(int(size))
    return int(size)


def _check_answer(status: int, headers: Mapping[str, str], asked: Asked) -> None:
    """Raises FileNotFoundError, PermissionError, Refused, TryLater or Fault unless what follows is what was asked."""
    if status >= 300:
        _refuse(status, headers, asked)
    encoding = headers.get("content-encoding", "identity")
    if encoding not in ("", "identity"):
        raise Fault(f"it sends the file compressed ({encoding[:20]}), which it was asked not to: switch that off there")
    if asked.stop is not None:
        answered = headers.get("content-range", "")
        if status != 206:
            raise Fault(
                f"it answers {status} to a request for bytes {asked.start} to {asked.stop}, the whole file: it serves "
                "no ranges, which reading from it takes"
            )
        if answered.partition("/")[0] != f"bytes {asked.start}-{asked.stop - 1}":
            raise Fault(
                f"asked for bytes {asked.start} to {asked.stop} it sends {answered[:60]!r}, others: it does not keep "
                "to ranges, or its file is shorter than the one that was uploaded"
            )
    elif status != 200:
        raise Fault(f"it answers {status} to a request for a whole file")
    length = headers.get("content-length", "")
    if length.isdigit() and len(length) < 20:
        asked.check_length(int(length))


def _refuse(status: int, headers: Mapping[str, str], asked: Asked) -> None:
    if status in (404, 410):
        raise FileNotFoundError(f"status {status}")
    if status in (401, 403):
        raise PermissionError(f"status {status}")
    if status == 416:
        raise Refused(f"status 416: bytes {asked.start} to {asked.stop} are beyond the end of its file")
    if "retry-after" in headers:
        raise TryLater(f"status {status}", _seconds(headers["retry-after"]))
    if status < 500 and status not in _RECOVERS:
        raise Refused(f"status {status}")
    raise Fault(f"status {status}")


def _seconds(retry_after: str) -> float:
    """Retry-After, seconds or a date, in seconds from now; 0 where it is neither."""
    if retry_after.isdigit():
        return float(retry_after[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


async def _body(pieces: AsyncIterator[bytes], asked: Asked) -> bytes:
    """All that comes, as long as it is not too much and not too slow."""
    began, data = time.monotonic(), bytearray()

    async def all_of_it() -> None:
        async for piece in pieces:
            data.extend(piece)
            if len(data) > asked.most:
                asked.check_length(len(data))
            if time.monotonic() - began > asked.seconds(len(data)):
                raise _slow(len(data), time.monotonic() - began)

    await _soon(all_of_it(), asked.seconds(asked.most))
    return bytes(data)


def _slow(size: int, seconds: float) -> Fault:
    return Fault(f"{size} bytes in {seconds:.0f} s: less than {LEAST_SPEED / 1024:.0f} KiB a second")


async def _soon(work: Awaitable[Value], seconds: float | None = None) -> Value:
    """What `work` gives within `seconds`, those of an answer's headers unless given."""
    limit = QUIET_SECONDS if seconds is None else seconds
    try:
        return await asyncio.wait_for(work, limit)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise Fault(f"no answer, or no end of it, in {limit:.0f} s") from error


def _in_time(read: Callable[[], bytes], seconds: float) -> bytes:
    """`read` in a thread of its own, which is left alone where it takes longer."""
    found: list[bytes] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(read())
        except BaseException as error:  # for whoever waits
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise Fault(f"no answer in {seconds:.0f} s")
    return found[0]
