"""How does every fault of a corpus of damaged sets end: repaired, substituted and counted, or one clear error?

`python -m benchmarks.faults.faults 17` runs case 17 alone and prints how it ended.
"""

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beitforge.shards.decode import codec
from beitforge.shards.decode.codec import ImageError
from beitforge.shards.pack.adopt import adopt
from beitforge.shards.pack.encode import EncodeOptions
from beitforge.shards.pack.pack import pack
from beitforge.shards.pack.plan import PackOptions
from beitforge.shards.pack.tar_scan import read_tar
from benchmarks.faults.corpus.damage import OTHER_TOKENS, STORED, flip_tokens, tokens_of_another
from benchmarks.faults.corpus.damage import Damage as StoredDamage
from benchmarks.faults.corpus.foreign import FOREIGN, harm_index, make_tars, write_tar
from benchmarks.faults.corpus.foreign import Damage as ForeignDamage
from benchmarks.faults.corpus.judge import (
    OUTCOMES,
    Truth,
    Verdict,
    central_sample,
    compare,
    ended,
    open_stream,
    places_of,
    read_epoch,
    truth_of,
)
from benchmarks.faults.corpus.odd import ODD, Odd
from benchmarks.faults.corpus.sets import Stored, encoded_image, linked, make_set, quiet, write_files, write_tokens
from benchmarks.results import write

SEED, ROUNDS = 0, 50
_WORKER_ROUNDS = 3
_GOOD = 3

Judge = Callable[["Case", Path], Verdict]


@dataclass(frozen=True)
class Bases:
    """A whole set, another of the same names and sizes, and the truth about the first, with tokens and without."""

    stored: Stored
    other: Stored
    recorded: Truth
    central: Truth


@dataclass(frozen=True)
class Case:
    """One mutation: all of it follows from (seed, number). In the first rounds worker processes read the set."""

    seed: int
    number: int
    bases: Bases

    @property
    def workers(self) -> int:
        return int(self.number // len(KINDS) < _WORKER_ROUNDS)

    def generator(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.number])


@dataclass(frozen=True)
class Ended:
    """A case that was judged."""

    number: int
    kind: str
    verdict: Verdict


def make_bases(folder: Path) -> Bases:
    """Two whole sets below `folder`, and the truth about the first."""
    stored, other = make_set(folder / "stored", 1), make_set(folder / "other", 2)
    write_tokens(stored, other.folder / OTHER_TOKENS, 3)
    recorded, central = truth_of(stored.images, stored.tokens), truth_of(stored.images, None)
    return Bases(stored, other, recorded, central)


def damaged_stored(damage: StoredDamage) -> Judge:
    """Damage after packing; read with tokens or, in one case of four that are not about them, without."""

    def judge(case: Case, folder: Path) -> Verdict:
        rng = case.generator()
        copy = linked(case.bases.stored, folder)
        damage(rng, copy, case.bases.other)
        paired = damage in (flip_tokens, tokens_of_another) or bool(rng.integers(4))
        truth = case.bases.recorded if paired else case.bases.central

        def read() -> Verdict:
            stream = open_stream(copy.images, copy.tokens if paired else None)
            return compare(truth, *read_epoch(stream, len(stream.images), case.workers))

        return ended(read, [str(folder), *case.bases.stored.names])

    return judge


def read_foreign(folder: Path, originals: dict[str, tuple[bytes, int]], workers: int) -> Verdict:
    """Read an adopted folder: exactly these keys, each with its own image and label."""
    order, stream = _places(folder), open_stream(folder, None)
    if sorted(key for _, key in order) != sorted(originals):
        return Verdict("silent", f"the keys are {sorted(key for _, key in order)}")
    truth = Truth({place: central_sample(*originals[place[1]]) for place in order if _decodes(originals, place)}, order)
    return compare(truth, *read_epoch(stream, len(order), workers))


def _places(folder: Path) -> list[tuple[str, str]]:
    """Shard and key of every sample of a folder that was adopted."""
    stream = open_stream(folder, None)
    return places_of(stream, len(stream.images))


def _decodes(originals: dict[str, tuple[bytes, int]], place: tuple[str, str]) -> bool:
    try:
        codec.decode(originals[place[1]][0])
    except ImageError:
        return False
    return True


def damaged_foreign(damage: ForeignDamage) -> Judge:
    """Damage to tars before `index` sees them."""

    def judge(case: Case, folder: Path) -> Verdict:
        rng = case.generator()
        originals = make_tars(rng, folder)
        damage(rng, folder)

        def read() -> Verdict:
            told = adopt(folder, 1).left_out
            lacking = set(originals) - {key for _, key in _places(folder)}
            there = {key: image for key, image in originals.items() if key not in lacking}
            verdict = read_foreign(folder, there, 0)
            if not lacking or verdict.outcome != "harmless":
                return verdict
            named = sum(told.counts.values()) == len(lacking) and any(
                key[-4:] in first for key in lacking for first in told.first.values()
            )
            return Verdict("refused" if named else "silent", f"left out {lacking}, told {told.lines()}")

        return ended(read, [str(folder), "first", "second"])

    return judge


def indexed_again(case: Case, folder: Path) -> Verdict:
    """An index is harmed and `index` runs again: it must be as if nothing had been."""
    rng = case.generator()
    originals = make_tars(rng, folder)
    adopt(folder, 1)
    harm_index(rng, folder)

    def read() -> Verdict:
        again = adopt(folder, 1)
        verdict = read_foreign(folder, originals, 0)
        return Verdict("repaired") if verdict.outcome == "harmless" and again.kept < 2 else verdict

    return ended(read, [str(folder), "first", "second"])


def accepted(odd: Odd, stored: bytes) -> Verdict:
    """The verdict about an odd image that was stored as these bytes and will be trained on."""
    if odd.pixels is None:
        return Verdict("silent", "what is no image was accepted")
    pixels = codec.decode(stored)
    if odd.unknowable:
        return Verdict("as found")
    if pixels.shape != odd.pixels.shape:
        return Verdict("silent", f"its shape is {pixels.shape}, it should be {odd.pixels.shape}")
    difference = float(np.abs(pixels.astype(int) - odd.pixels).mean())
    if difference > odd.tolerance:
        return Verdict("silent", f"its pixels are {difference:.1f} levels from what they should be")
    return Verdict("harmless")


def good_images(rng: np.random.Generator) -> dict[str, bytes]:
    """The ordinary images an odd one stands between, by file name."""
    made = [encoded_image(int(rng.integers(10**6))) for _ in range(_GOOD)]
    return {f"good{number}.{extension}": data for number, (data, extension) in enumerate(made)}


def odd_adopted(make: Callable[[np.random.Generator], Odd]) -> Judge:
    """An odd image in a foreign tar: the stream shows it rightly, or another in its place."""

    def judge(case: Case, folder: Path) -> Verdict:
        rng = case.generator()
        odd = make(rng)
        files = [*good_images(rng).items()]
        files.insert(int(rng.integers(_GOOD + 1)), (f"odd.{odd.extension}", odd.data))
        folder.mkdir()
        write_tar(folder / "first.tar", files)

        def read() -> Verdict:
            adopt(folder, 1)
            verdict = read_foreign(folder, {name.split(".")[0]: (data, 0) for name, data in files}, case.workers)
            return accepted(odd, odd.data) if verdict.outcome == "harmless" else verdict

        return ended(read, [str(folder), "first", "odd"])

    return judge


def odd_packed(make: Callable[[np.random.Generator], Odd]) -> Judge:
    """An odd image among those to be packed: stored as it is, encoded anew, or left out by name and reason."""

    def judge(case: Case, folder: Path) -> Verdict:
        rng = case.generator()
        odd, lossy = make(rng), bool(rng.integers(2))
        name = f"odd.{odd.extension}"
        files = {**good_images(rng), name: odd.data}
        sources = write_files(folder / "sources", files)

        def read() -> Verdict:
            packed = pack(sources, folder / "set", PackOptions(encoding=EncodeOptions(to_rgb8=lossy)), "1%", 1)
            stored = stored_images(folder / "set")
            reasons = {row["path"]: row["reason"] for row in packed.rejected}
            expected = {file.split(".")[0]: data for file, data in files.items() if file not in reasons}
            others = {key: data for key, (data, _) in stored.items() if key != "odd"}
            if set(reasons) - {name} or others != {key: data for key, data in expected.items() if key != "odd"}:
                return Verdict("silent", f"ordinary images were changed or left out ({reasons})")
            verdict = read_foreign(folder / "set", {key: (data, 0) for key, (data, _) in stored.items()}, 0)
            if verdict.outcome != "harmless" or ("odd" in stored) == (name in reasons):
                return Verdict("silent", f"{verdict}, rejected {reasons}, stored {sorted(stored)}")
            if name in reasons:
                return Verdict("refused" if reasons[name] else "silent", reasons[name])
            verdict = accepted(odd, stored["odd"][0])
            changed = stored["odd"] != (odd.data, odd.extension)
            return Verdict("repaired") if changed and verdict.outcome == "harmless" else verdict

        return ended(read, [str(folder), "odd"])

    return judge


def stored_images(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Bytes and extension of every image of an image set, by key, from its tars alone."""
    found = {}
    for tar in sorted(folder.glob("*.tar")):
        data = tar.read_bytes()
        for sample in read_tar(tar).samples:
            extension = next(name for name in sample.members if name not in ("json", "cls"))
            place = sample.image
            found[sample.key] = data[place.offset : place.offset + place.size], extension
    return found


KINDS: tuple[tuple[str, Judge], ...] = (
    *((f"packed set: {name}", damaged_stored(damage)) for name, damage in STORED),
    *((f"foreign tar: {name}", damaged_foreign(damage)) for name, damage in FOREIGN),
    ("foreign tar: index harmed, indexed again", indexed_again),
    *((f"image in a foreign tar: {name}", odd_adopted(make)) for name, make in ODD),
    *((f"image to pack: {name}", odd_packed(make)) for name, make in ODD),
)


def run(bases: Bases, folder: Path, seed: int, numbers: Iterable[int]) -> list[Ended]:
    """Judge the cases of these numbers, each in an empty folder below `folder`. Case n is of kind n mod len(KINDS)."""
    done = []
    for number in numbers:
        kind, judge = KINDS[number % len(KINDS)]
        here = folder / f"case{number}"
        with quiet():
            verdict = judge(Case(seed, number, bases), here)
        shutil.rmtree(here)
        done.append(Ended(number, kind, verdict))
    return done


def table(done: list[Ended]) -> list[dict]:
    """A row per kind, and one of sums: how many of its cases ended in which way."""
    rows = []
    for kind in [*(kind for kind, _ in KINDS), "all"]:
        verdicts = [case.verdict.outcome for case in done if kind in (case.kind, "all")]
        counts = Counter(verdicts)
        rows.append({"fault": kind, "cases": len(verdicts), **{outcome: counts[outcome] for outcome in OUTCOMES}})
    return rows


def main() -> None:
    """ROUNDS cases of every kind; no numbers when one ended in a way that it must not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases = make_bases(folder)
        if len(sys.argv) > 1:
            sys.exit("\n".join(str(case) for case in run(bases, folder, SEED, [int(sys.argv[1])])))
        done = run(bases, folder, SEED, range(ROUNDS * len(KINDS)))
    wrong = [case for case in done if case.verdict.outcome in ("silent", "traceback")]
    if wrong:
        sys.exit("\n".join(str(case) for case in wrong))
    notes = [
        "Each case is one random mutation of a small set, read for one epoch; every sample must be byte for byte "
        "(pixels, tokens, view, label) the undamaged set's in its place, or in the place of the substitute named for "
        "it. *repaired*: encoded anew by `pack` or indexed again by `index`, and right. *substituted*: another sample "
        "stands in, named and counted. *refused*: one line that names file, shard or key, or a line of "
        "`rejected.jsonl`. *harmless*: read as if undamaged. *as found*: the file was damaged before anyone took its "
        "checksum, and the decoder takes it for an image; no reader can know. *silent* (a wrong sample, or fewer) "
        "and *traceback* (any other exception, a hang, an error that names nothing) must be 0."
    ]
    question = f"how does every fault of a corpus of {len(done)} damaged sets end (seed {SEED})?"
    write("faults", question, table(done), {}, notes)


if __name__ == "__main__":
    main()
