"""Seeded harm to files of foreign making, and the bounds within which whoever reads them must come to an end.

A case is a seed and a number: `chance(seed, number)` draws its mutations, so what is found can be found again. Bytes
are harmed anywhere (`harmed`), JSON at its values and its structure (`harmed_json`), both to what parsers are known to
stumble over. `ended` runs a parser within `limits` and says whether it came to a value or to its one line.
"""

import contextlib
import copy
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults.corpus.judge import Hang, limited

NIGHTLY = os.environ.get("BEITFORGE_NIGHTLY") == "1"

_NUMBERS = (0, 1, -1, 7, 127, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**60, 2**63 - 1, 2**63)
_NUMBERS += (2**64 - 1, 2**64, 10**30, -(2**31), -(2**63))
_TEXTS = ("", ".", "..", "/", "../../etc/passwd", "/etc/passwd", "a/b", "\0", "a\nb", "\x1b[31m", "\ud800", "é" * 300)
_TEXTS += ("x" * 70_000, "7", "-1", "1e999", "true", "%s%n", "shard-000000", "http://127.0.0.1:1/", "‮", "nan")
_PIECES = (
    b"\0",
    b"\xff",
    b"\0" * 512,
    b"\xff" * 64,
    b"\x80",
    b"\n",
    b'"',
    b"{",
    b"[" * 2000,
    b"}",
    b"9" * 5000,
    b"NaN",
)
_PIECES += (b"-1", b"\xed\xa0\x80", b"\xff\xfe", b"1e999", b"null", b"\x00\x00\x00\x00\x00\x00\x00\x10")


def tried(count: int, what: str) -> None:
    """Print how many cases of something were tried, for `bench attacks` to add up."""
    print(f"\ntried {count} {what}")


def chance(seed: int, number: int) -> random.Random:
    """The draws of one case."""
    return random.Random(f"{seed} {number}")


def harmed(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to four mutations: flips, overwritten numbers, cuts, repeats, splices, swaps, other digits."""
    for _ in range(rng.randint(1, 4)):
        data = rng.choice(_HARMS)(data, rng) if data else rng.choice(_PIECES)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def _flip_early(data: bytes, rng: random.Random) -> bytes:
    """Where headers are."""
    place = rng.randrange(min(len(data), 600))
    return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]


def _number(data: bytes, rng: random.Random) -> bytes:
    width, place = rng.choice((1, 2, 4, 8)), rng.randrange(len(data))
    value = (rng.choice(_NUMBERS) % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))
    return data[:place] + value + data[place + width :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _cut_out(data: bytes, rng: random.Random) -> bytes:
    start, size = rng.randrange(len(data)), rng.choice((1, 7, 8, 100, 512, 4096))
    return data[:start] + data[start + size :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, size = rng.randrange(len(data)), rng.choice((1, 8, 512, 1024, 4096))
    part = data[start : start + size]
    return data[:start] + part * rng.choice((2, 3, 50)) + data[start + size :]


def _splice(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(_PIECES) + data[place:]


def _swap(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice((1, 8, 512))
    one, other = sorted(rng.randrange(len(data)) for _ in range(2))
    if other - one < size:
        return data
    return (
        data[:one]
        + data[other : other + size]
        + data[one + size : other]
        + data[one : one + size]
        + data[other + size :]
    )


def _digits(data: bytes, rng: random.Random) -> bytes:
    """Another number where one is written in digits."""
    places = [place for place in range(len(data)) if data[place : place + 1].isdigit()][:2000]
    if not places:
        return data
    start = rng.choice(places)
    stop = start
    while data[stop : stop + 1].isdigit():
        stop += 1
    return data[:start] + str(rng.choice(_NUMBERS)).encode() + data[stop:]


_HARMS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _flip,
    _flip_early,
    _number,
    _cut,
    _cut_out,
    _repeat,
    _splice,
    _swap,
    _digits,
)


def harmed_json(content: Any, rng: random.Random) -> bytes:
    """A JSON text of `content` with one to three of its places harmed, or harmed as bytes; now and then at its root."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(content))
        if not places or rng.random() < 0.02:
            content = _other(content, rng)
            continue
        holder, key = rng.choice(places)
        what = rng.random()
        if what < 0.12:
            del holder[key]
        elif what < 0.2 and isinstance(holder, dict):
            holder[rng.choice(_TEXTS)] = holder.pop(key)
        elif what < 0.28 and isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(holder[key])] * rng.choice((1, 1, 2000))
        else:
            holder[key] = _other(holder[key], rng)
    text = json.dumps(content).encode()
    if rng.random() < 0.1:
        text = text.replace(b'"@deep@"', b"[" * 100_000 + b"]" * 100_000)
    text = text.replace(b'"@deep@"', rng.choice((b"[" * 900 + b"]" * 900, b'{"a":' * 500 + b"1" + b"}" * 500)))
    text = text.replace(b'"@digits@"', b"9" * rng.choice((30, 4000, 45_000)))
    if rng.random() < 0.1 and (place := text.find(b'":')) > 0:  # a name twice
        text = (
            text[: text.find(b"{") + 1]
            + b'"'
            + text[text.find(b'"') + 1 : place]
            + b'": 7, '
            + text[text.find(b"{") + 1 :]
        )
    return harmed(text, rng) if rng.random() < 0.1 else text


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every place below a value: its list or object, and its index or name."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in list(keys):
        yield content, key
        yield from _places(content[key])


def _other(value: Any, rng: random.Random) -> Any:
    choices: list[Any] = [None, True, False, [], {}, [[]], float("nan"), float("inf"), -0.0, 1.5, "@deep@", "@digits@"]
    choices += [
        rng.choice(_NUMBERS),
        rng.choice(_NUMBERS),
        rng.choice(_TEXTS),
        rng.choice(_TEXTS),
        [value],
        {"a": value},
    ]
    choices += [str(value)[:100], [value] * 3, [0] * 10_000]
    if type(value) is int:
        choices += [value + 1, value - 1, -value, float(value), str(value), value * 2**20]
    if isinstance(value, str):
        choices += [value + "\n", value[:-1], value.upper(), f"../{value}", value * 2, f"{value}\0"]
    return rng.choice(choices)


@contextlib.contextmanager
def limits(seconds: float, megabytes: int) -> Iterator[None]:
    """Bound the block: Hang after `seconds` (in the main thread), MemoryError for more address space than `megabytes`
    beyond what the process has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        with limited(seconds):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def ended(
    parse: Callable[[], object],
    refusal: type[Exception] | tuple[type[Exception], ...],
    what: str,
    seconds: float = 5.0,
    megabytes: int = 512,
) -> str:
    """How `parse` ended: "value", or the line of its `refusal`. Raises AssertionError, which says `what` case it was,
    for any other exception, a message of several lines or none, and whatever exceeds the bounds."""
    try:
        with limits(seconds, megabytes):
            parse()
            return "value"
    except refusal as error:
        line = str(error)
        if not line or "\n" in line or not line.isprintable() or len(line) > 5000:
            raise AssertionError(f"{what}: not one line: {line[:300]!r}") from error
        return line
    except (Exception, Hang) as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
