"""Every fault of a generated corpus is repaired, substituted and counted, or one clear error: never a wrong sample.

The corpus and its judge are benchmarks/faults/faults.py; `python -m benchmarks.faults.faults NUMBER` runs one case of
seed 0 again.
"""

import functools
from collections import Counter
from pathlib import Path

import pytest
import torch
import xxhash

from beitforge.shards.errors import ShardError
from benchmarks.faults.corpus.judge import Verdict, ended
from benchmarks.faults.faults import KINDS, SEED, Bases, Ended, make_bases, run, table

CASES = 20 * len(KINDS)
FLIPPED = [name for name, _ in KINDS].index("packed set: bits flipped in images")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Thousands of tiny images: threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Bases:
    return make_bases(tmp_path_factory.mktemp("bases"))


def test_every_fault_ends_in_one_of_three_ways(bases, tmp_path):
    """Over a thousand mutations, every kind of them, the first rounds read by worker processes."""
    assert CASES >= 1000
    done = run(bases, tmp_path, SEED, range(CASES))
    wrong = [case for case in done if case.verdict.outcome in ("silent", "traceback")]
    assert not wrong, "\n".join(map(str, wrong))
    assert min(Counter(case.kind for case in done).values()) == CASES // len(KINDS)
    every = table(done)[-1]
    assert every["cases"] == CASES == sum(count for name, count in every.items() if name not in ("fault", "cases"))
    for outcome in ("repaired", "substituted", "refused", "harmless"):
        assert every[outcome] >= CASES // 20, every


def test_most_cases_do_harm(bases, tmp_path):
    """The damage is real: what a kind must come to, it does come to."""
    done = run(bases, tmp_path, SEED + 1, range(3 * len(KINDS)))
    ends: dict[str, set[str]] = {}
    for case in done:
        ends.setdefault(case.kind, set()).add(case.verdict.outcome)
    for kind, expected in {
        "packed set: bits flipped in images": {"substituted"},
        "packed set: bits flipped in an index": {"refused"},
        "packed set: bits flipped in a token file": {"refused"},
        "packed set: images of one size swapped": {"substituted"},
        "packed set: tar cut on a member boundary": {"refused"},
        "packed set: token file or manifest of another set": {"refused"},
        "foreign tar: tar cut on a member boundary": {"refused"},
        "foreign tar: duplicate keys": {"refused"},
        "foreign tar: index harmed, indexed again": {"repaired"},
        "image in a foreign tar: empty file": {"substituted"},
        "image in a foreign tar: progressive JPEG": {"harmless"},
        "image to pack: 16-bit PNG": {"refused", "repaired"},  # as --to-rgb8 says
        "image to pack: decompression bomb": {"refused"},
    }.items():
        assert ends[kind] == expected, kind


def flips(bases: Bases, folder: Path) -> list[Ended]:
    return run(bases, folder, SEED, range(FLIPPED + 5 * len(KINDS), 15 * len(KINDS), len(KINDS)))


class Blind:
    """A checksum that agrees with every other."""

    xxh3_128 = staticmethod(xxhash.xxh3_128)

    @staticmethod
    def xxh3_64_intdigest(data: bytes) -> int:
        return _Agreeable()


class _Agreeable(int):
    def __ne__(self, other: object) -> bool:
        return False


def test_without_checksums_the_judge_finds_wrong_samples(bases, tmp_path, monkeypatch):
    """The test above can fail: a reader that does not look gives wrong pixels, and is caught."""
    assert {case.verdict.outcome for case in flips(bases, tmp_path)} == {"substituted"}
    monkeypatch.setattr("beitforge.shards.storage.reading.xxhash", Blind)
    assert Counter(case.verdict.outcome for case in flips(bases, tmp_path))["silent"] > 3


class TwoLines(ShardError):
    """One that evades ShardError's rule."""

    def __str__(self) -> str:
        return f"{self.args[0]}\nmend it"


def raises(error: Exception) -> Verdict:
    raise error


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ShardError("shard-000001 is damaged: repair it"), "refused"),
        (ShardError("something is damaged"), "traceback"),
        (ShardError("shard-000001 is damaged\nmend it"), "refused"),
        (TwoLines("shard-000001 is damaged"), "traceback"),
        (KeyError("shard-000001"), "traceback"),
    ],
    ids=["named", "unnamed", "made one line", "two lines", "another"],
)
def test_only_a_line_that_names_what_is_wrong_is_a_refusal(error, outcome):
    assert ended(functools.partial(raises, error), ["shard-000001"]).outcome == outcome


def test_a_hang_is_found(monkeypatch):
    """Also where what hangs takes every error for the disk's."""
    monkeypatch.setattr("benchmarks.faults.corpus.judge._SECONDS", 0.1)

    def hang() -> Verdict:
        while True:
            try:
                sum(range(1000))
            except OSError:
                continue

    assert ended(hang, []).detail == "Hang: not done after 0.1 s"


def test_cases_follow_from_seed_and_number(bases, tmp_path):
    """What is found can be found again."""
    numbers = [3, 200, 777, 901]
    first, second = (run(bases, tmp_path, SEED, numbers) for _ in range(2))
    assert first == second
