"""The keys of image files: what their paths become in a tar."""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import xxhash

from beitforge.shards.errors import ShardError
from beitforge.shards.pack.listing.texts import Texts

_WIDTH = 48  # bytes of a key by which keys are sorted first
# Bytes of a path that stand in its key as they are.
_PLAIN = bytes(byte for byte in range(32, 127) if byte not in b".%/")
# What WebDataset, a tar or a terminal would trip over: control characters, and undecodable bytes, which arrive as
# surrogates; WebDataset ends a key at the first dot of the file's name.
_ESCAPED = re.compile("[%.\0-\x1f\x7f-\x9f\udc80-\udcff]")


def _percent(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"%{code - 0xDC00:02X}"
    return "".join(f"%{byte:02X}" for byte in match[0].encode())


def key_of(path: str, with_extension: bool) -> str:
    """The key of a relative path: with or without its extension, percent-encoded where need be; spaces and letters of
    any script stay."""
    dot = path.rfind(".", path.rfind("/") + 1)
    key = _ESCAPED.sub(_percent, path if with_extension or dot < 0 else path[:dot])
    # webdataset skips members whose first folder looks like __this__
    return f"%5F{key[1:]}" if key.startswith("__") else key


@dataclass(frozen=True)
class Keys:
    """Of n paths: `order` i64 [n], their numbers sorted by key; for path i `whole` bool [n], whether its key has the
    extension, and `hashes` u64 [n], of its key (shards.counter_rng.hash_key)."""

    order: np.ndarray
    whole: np.ndarray
    hashes: np.ndarray


def keys_of(paths: Texts) -> Keys:
    """The keys of paths: without extension, escaped; all distinct. Where several files of a folder share a stem, each
    of those keys keeps its extension (`a%2Ejpg`, `a%2Epng`). Raises ShardError where two have the same hash."""
    whole, hashes = np.zeros(len(paths), bool), np.empty(len(paths), np.uint64)
    most = min(_WIDTH, max(paths.longest(), 1))
    heads, width = np.empty(len(paths), f"S{most}"), 0
    for first, part in paths.parts():
        keys = _keys_in(part)
        rows = slice(first, first + len(keys))
        hashes[rows] = [_hash(key) for key in keys]
        longest = max(map(len, keys))
        heads[rows] = keys if longest <= most else [key[:most] for key in keys]
        width = max(width, longest)
    for i in _set_apart(paths, whole, hashes):
        key = _encoded(paths[i], True)
        heads[i], width = key[:most], max(width, len(key))
    order = np.argsort(heads, kind="stable")
    if width > most:
        _sort_equal_heads(paths, whole, heads, order)
    return Keys(order, whole, hashes)


def _hash(key: bytes) -> int:
    return xxhash.xxh3_64_intdigest(key)


def _encoded(path: str, with_extension: bool) -> bytes:
    return key_of(path, with_extension).encode()


def _keys_in(part: bytes) -> list[bytes]:
    """The keys, without extension, of paths with a NUL behind each."""
    rows = part[:-1].split(b"\0")
    odd = part.translate(None, _PLAIN)
    one_dot_each = odd.replace(b"/", b"") == b".\0" * len(rows) and b"./" not in odd
    if one_dot_each and not part.startswith(b"__") and b"\0__" not in part:
        return [row[: row.rfind(b".")] for row in rows]
    return [_encoded(row.decode("utf-8", "surrogateescape"), False) for row in rows]


def _set_apart(paths: Texts, whole: np.ndarray, hashes: np.ndarray) -> list[int]:
    """Give keys that several paths share their extensions, in `whole` and `hashes`. Returns which."""
    changed: list[int] = []
    while True:
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        candidates = np.unique(np.concatenate([order[same], order[same + 1]])).tolist()
        keys = {i: _encoded(paths[i], bool(whole[i])) for i in candidates}
        counts = Counter(keys.values())
        shared = [i for i, key in keys.items() if counts[key] > 1 and not whole[i]]
        if not shared:
            break
        for i in shared:
            whole[i] = True
            hashes[i] = _hash(_encoded(paths[i], True))
        changed += shared
    if candidates:
        first, second = sorted(keys[i].decode() for i in order[same[0] : same[0] + 2].tolist())
        raise ShardError(f"the keys {first} and {second} have the same 64-bit hash: rename one of the two images")
    return changed


def _sort_equal_heads(paths: Texts, whole: np.ndarray, heads: np.ndarray, order: np.ndarray) -> None:
    """Put right in `order`, which is by the first bytes of the keys, those that agree in them."""
    alike = heads[order[1:]] == heads[order[:-1]]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], alike, [False]]).astype(np.int8)))
    for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        group = order[start : stop + 1].tolist()
        order[start : stop + 1] = sorted(group, key=lambda i: _encoded(paths[i], bool(whole[i])))
