"""A folder behind a URL: whole files and ranges of them, by any scheme fsspec knows. The one file that knows fsspec.

Credentials, endpoints and the like are fsspec's own: its configuration files and environment, or those of the store's
library. A request that fails is made again with growing pauses and is then fatal; nothing is ever left out.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from beitforge.shards.errors import Damaged, ShardError
from beitforge.shards.storage import fetching
from beitforge.shards.storage.cache import Cache, Uses
from beitforge.shards.storage.fetching import Asked, Refused, fetch
from beitforge.shards.storage.own_folder import default_folder
from beitforge.shards.storage.reading import OpenFile
from beitforge.shards.storage.retry import READS, TryLater, retry

Value = TypeVar("Value")

_BLOCK = 512  # of a tar: its first two, the header and the data of a member, are never alike
_CURE = "check the address, the credentials and the store, then start again"
_log = logging.getLogger(__name__)


def is_url(where: object) -> bool:
    """Whether a place is a URL, and no path of this machine."""
    return "://" in str(where)


def cache_for(where: str, folder: str, gigabytes: float) -> Cache | None:
    """The cache that a set is read through; None for a folder of this machine. folder: empty for own_folder's
    default."""
    if not is_url(where):
        return None
    return Cache(Path(folder) if folder else default_folder(), int(gigabytes * 1e9))


class Missing(ShardError):
    """The store says that there is no such file."""


class Remote:
    """What lies below a URL. May be handed to worker processes: each makes its own connections."""

    def __init__(self, url: str, optional: bool = False):
        """optional: what is read can be done without, and is asked for no more than twice."""
        self.url, self._optional = url.rstrip("/"), optional

    def __str__(self) -> str:
        return self.url

    def whole(self, name: str, most: int) -> bytes:
        """A whole file of at most `most` bytes. Raises Missing when the store says there is none, ShardError when it
        cannot be read."""
        return self._tried(name, Asked(0, None, most))

    def part(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start … stop - 1 of a file, all of them. Raises as `whole` does."""
        return self._tried(name, Asked(start, stop, stop - start))

    def check_ranges(self, name: str) -> None:
        """Raises ShardError where a store says that it sends a part of a tar, and sends another, which makes every
        sample look damaged."""
        if self.part(name, 0, 2 * _BLOCK)[_BLOCK:] != self.part(name, _BLOCK, 2 * _BLOCK):
            raise ShardError(f"{self.url}/{name}: the store sends other bytes than it is asked for: {_CURE}")

    def _tried(self, name: str, asked: Asked) -> bytes:
        where = f"{self.url}/{name}"

        def once() -> bytes:
            try:
                system, root = _system(self.url, os.getpid())
                return fetch(system, f"{root}/{name}", asked)
            except FileNotFoundError as error:
                raise Missing(f"{where} is not there: {_CURE}") from error

        # Every store's library has errors of its own, few of them OSErrors, and none may be taken for the data's.
        fatal = _not_soon if self._optional else _refused
        return retry(once, where, _CURE, errors=Exception, fatal=fatal, spread=0.5, brief=self._optional)


def _refused(error: Exception) -> bool:
    """Whether a store will give the same answer again."""
    return isinstance(error, (PermissionError, Refused))


def _not_soon(error: Exception) -> bool:
    """Whether a store will give the same answer again, or another one only later."""
    return _refused(error) or isinstance(error, TryLater)


@dataclass(frozen=True)
class Kept:
    """Whole files of a remote set, kept in the cache under the name of the set. reads: of what comes damaged."""

    remote: Remote
    cache: Cache
    owner: str
    reads: int = READS

    def open(
        self,
        name: str,
        digest: str,
        most: int,
        open_: Callable[[OpenFile], Value],
        uses: Uses | None = None,
        but_last: int = 0,
    ) -> Value:
        """What `open_` makes of a file that its manifest lists by a digest (xxh3-128) of all but its last bytes, and
        that has at most `most` bytes. `open_` proves that it is the one, or raises Damaged: then, if it is damaged in
        the cache, it is fetched again. Raises ShardError when the store's own copy has another digest."""
        for _ in range(self.reads):
            self.cache.keep_whole(f"{self.owner}/{name}", lambda: self._fetched(name, digest, most, but_last), uses)
            with contextlib.suppress(FileNotFoundError):  # another process needed its room
                file = self.cache.open(f"{self.owner}/{name}")
                try:
                    return open_(file)
                except Damaged:
                    if file.digest(but_last) == digest:
                        raise
                self.again(name)
        raise ShardError(f"{self.cache.folder} does not keep {self.remote}/{name}: raise data.cache_gb")

    def again(self, name: str) -> None:
        """Have a file fetched anew when it is opened next."""
        _log.warning("%s/%s is damaged in the cache; fetching it again", self.remote, name)
        self.cache.drop(f"{self.owner}/{name}")

    def _fetched(self, name: str, digest: str, most: int, but_last: int) -> bytes:
        for _ in range(self.reads):
            data = self.remote.whole(name, most)
            if xxhash.xxh3_128_hexdigest(data[: max(0, len(data) - but_last)]) == digest:
                return data
            _log.warning("%s/%s came damaged; fetching it again", self.remote, name)
        raise ShardError(
            f"{self.remote}/{name} is not the file its manifest lists (digest differs): upload the set again"
        )


@functools.lru_cache(maxsize=64)
def _system(url: str, _: int) -> tuple[Any, str]:
    """This process's connection to the store, and the path of the URL within it."""
    try:
        import fsspec
        from fsspec.config import conf
    except ImportError as error:
        raise ShardError(f"{url} is read by fsspec, which is not installed: pip install '.[remote]'") from error
    scheme = url.partition("://")[0]
    try:
        options = _http_options(dict(conf.get(scheme, {}))) if scheme in ("http", "https") else {}
        system, root = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise ShardError(f"{url} cannot be read by fsspec: {error}") from error
    return system, root.rstrip("/")


def _http_options(known: dict) -> dict:
    """The files as they are, and not what a server keeps compressed beside them; a dead connection does not last."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=fetching.QUIET_SECONDS, sock_read=fetching.QUIET_SECONDS)
    headers = {"Accept-Encoding": "identity", **known.get("headers", {})}
    return {"headers": headers, "client_kwargs": {"timeout": timeout, **known.get("client_kwargs", {})}}
