"""The bookkeeping of `tokenize`: its cost is linear in the shards, and kills, copies and damage change nothing of what
the manifest says."""

import itertools
import json
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.data import token_folder
from beitforge.pipeline.data.token_folder import TASK, Claim, TokenFolder, Written
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.stages import tokenize
from beitforge.shards.format.levels import without_tones
from beitforge.shards.format.manifest import NAME, ImageManifest, ImageShard, TokenManifest, read_token_manifest
from beitforge.shards.format.tokens import least_bytes, token_shard_entry, write_token_shard
from beitforge.shards.format.views import FIELDS, ViewPolicy, Views, draw_views
from beitforge.shards.inspect.verify_tokens import verify_tokens
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.view_batches import Piece, ViewCutter, ViewLoader

IDENTITY = {"fingerprint": "f", "vocabulary": 9, "grid": [1, 2], "input_size": [8, 8], "precision": "fp32"}
SAMPLES = 2
_calls: Counter = Counter()
_counting = False


def _audited(event: str, _: tuple) -> None:
    if _counting and event in ("open", "os.scandir", "os.listdir"):
        _calls[event] += 1


sys.addaudithook(_audited)


@pytest.fixture
def counted(monkeypatch) -> Iterator[Counter]:
    """Calls of open, scandir, listdir and stat, by whatever name Python has for them."""
    global _counting
    stat = os.stat

    def counting(*args, **options):
        _calls["os.stat"] += 1
        return stat(*args, **options)

    monkeypatch.setattr(os, "stat", counting)
    _calls.clear()
    _counting = True
    yield _calls
    _counting = False


def shards(count: int) -> list[ImageShard]:
    digests = {"digest": "0" * 32, "index_digest": "0" * 32}
    return [ImageShard(name=f"s{n:05d}", samples=SAMPLES, bytes=9999, **digests) for n in range(count)]


def of(folder: Path, count: int, **changes) -> TokenFolder:
    images = SimpleNamespace(manifest=ImageManifest(shards=shards(count), classes=[], made_by={}))
    opened = TokenFolder(folder, images, {**IDENTITY, **changes}, {"seed": 0}, 1)
    opened.begin()
    return opened


def write(folder: TokenFolder, claim: Claim, finish: bool = True) -> None:
    """The token file of a claimed shard, and, unless its process is killed before that, its line."""
    keys, sides = np.arange(SAMPLES, dtype=np.uint64) + claim.number, np.full(SAMPLES, 40)
    views = draw_views(ViewPolicy(), keys, 0, sides, sides, without_tones(np.full(SAMPLES, 9, np.float32)))
    views = Views(*(getattr(views, name)[None] for name in FIELDS))
    tokens, bad = np.full((1, SAMPLES, 2), claim.number % 9), np.zeros(SAMPLES, np.uint8)
    stamp = {"stamp": folder.stamp(claim.number)}
    digests = write_token_shard(folder.path(claim.number), tokens, views, keys, bad, stamp)
    if finish:
        folder.finish(claim, digests, [])
    else:
        claim.release()


def fill(folder: TokenFolder, turn: int = 0) -> None:
    for claims in folder.passes(turn):
        for claim in claims:
            write(folder, claim)


def closed(folder: TokenFolder) -> bool:
    def manifest(written: list[Written]) -> TokenManifest:
        entries = [file.entry for file in written]
        return TokenManifest(shards=entries, tokenizer=IDENTITY, policy={"seed": 0}, num_views=1, provenance={})

    return folder.close(manifest)


def left_over(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix not in (".safetensors", ".columns")}


def test_the_manifest_is_what_reading_every_file_gives(tmp_path):
    """And nothing is left of the work."""
    folder = of(tmp_path, 5)
    fill(folder, turn=3)
    assert closed(folder) and left_over(tmp_path) == {NAME}
    expected = [token_shard_entry(tmp_path, shard.name, shard.digest) for shard in shards(5)]
    assert read_token_manifest(tmp_path).shards == expected
    assert verify_tokens(tmp_path, tmp_path, False, 1, pytest.fail).samples == 5 * SAMPLES


def test_calls_grow_with_the_shards_alone(tmp_path, counted):
    """A process that does everything, one that comes when all is done, and one that finds all but one finished."""
    for _ in range(2):  # what is imported when it is first used
        first = of(tmp_path / "first", 2)
        fill(first)
        closed(first)
    calls: dict[int, list[int]] = {}
    for count in (20, 80):
        where = tmp_path / str(count)
        counted.clear()
        folder = of(where, count)
        fill(folder)
        assert closed(folder)
        calls[count] = [counted.total()]
        counted.clear()
        again = of(where, count)
        fill(again)
        assert not closed(again)
        calls[count].append(counted.total())
        again.path(count - 1).unlink()
        counted.clear()
        third = of(where, count)
        fill(third)
        assert not closed(third)
        calls[count].append(counted.total())
    alone, late, one = zip(calls[20], calls[80], strict=True)
    assert alone[1] <= 4 * alone[0] and alone[1] <= 20 * 80
    assert late[0] == late[1] <= 10
    assert one[0] == one[1] <= 40


def test_a_start_into_a_folder_opens_no_token_file(tmp_path, counted):
    """The first one does, to see whose they are; then the folder says it."""
    count = 30
    folder = of(tmp_path, count)
    for claim in next(folder.passes(0)):
        write(folder, claim)
    counted.clear()
    assert len(of(tmp_path, count).finished) == count and counted["open"] <= 3 and counted["os.scandir"] <= 2
    (tmp_path / TASK).unlink()
    counted.clear()
    assert len(of(tmp_path, count).finished) == count and counted["open"] > count


@pytest.mark.parametrize("by", ["no line", "half a line", "a copy", "old version"])
def test_files_without_a_line_that_fits_are_read(tmp_path, by):
    """What a process left that was killed between a file and its line, in its line, or that was copied."""
    where, count = tmp_path / "a", 4
    folder = of(where, count)
    for claim in next(folder.passes(0)):
        write(folder, claim, finish=by not in ("no line", "old version") or claim.number != 2)
    if by == "half a line":
        lines = next(where.glob("*.finished"))
        lines.write_bytes(lines.read_bytes()[:-20])
    if by == "a copy":
        where = shutil.copytree(where, tmp_path / "b")
    if by == "old version":
        for path in [*where.glob("*.finished"), where / TASK]:
            path.unlink()
    folder = of(where, count)
    assert closed(folder) and left_over(where) == {NAME}
    assert read_token_manifest(where).shards == [token_shard_entry(where, s.name, s.digest) for s in shards(count)]


@pytest.mark.parametrize("how", ["changed", "cut"])
def test_a_damaged_file_is_not_closed(tmp_path, how):
    """Under no digest; once it is removed the same command ends well."""
    folder = of(tmp_path, 3)
    fill(folder)
    data = bytearray(folder.path(1).read_bytes())
    data[-9] ^= 1
    folder.path(1).write_bytes(data if how == "changed" else data[:-1])
    for opened in (folder, of(tmp_path, 3)):
        with pytest.raises(ValueError, match=r"s00001\.safetensors .*damaged"):
            closed(opened)
        assert NAME not in left_over(tmp_path)
    folder.path(1).unlink()
    again = of(tmp_path, 3)
    fill(again)
    assert closed(again)
    verify_tokens(tmp_path, tmp_path, False, 1, pytest.fail)


def test_a_bit_that_flips_on_the_disk_is_found_by_verify(tmp_path):
    """The manifest lists what was written, not what is there: reading the file at the end would list the damage."""
    folder = of(tmp_path, 2)
    fill(folder)
    path = folder.path(1)
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(-9, os.SEEK_END)
        byte = file.read(1)
        file.seek(-9, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    token_folder_facts = token_folder._facts
    facts = {path.stat().st_ino: token_folder_facts(before)}
    with pytest.MonkeyPatch.context() as patch:  # a disk changes no times
        patch.setattr(token_folder, "_facts", lambda found: facts.get(found.st_ino, token_folder_facts(found)))
        assert closed(folder)
    found: list[str] = []
    verify_tokens(tmp_path, tmp_path, False, 1, found.append)
    assert len(found) == 1 and "digest differs" in found[0]


def test_a_shard_is_one_process_s_until_it_ends(tmp_path):
    folder, other = of(tmp_path, 3), of(tmp_path, 3)
    claims, others = next(folder.passes(0)), next(other.passes(0))
    held = next(claims)
    assert (held.number, next(others).number) == (0, 1)
    held.release()  # killed
    assert next(other._claims([0])).number == 0


def test_one_process_closes(tmp_path):
    """Another that has waited for it, or comes after it, writes nothing and takes what a killed closer left away."""
    folder, other = of(tmp_path, 3), of(tmp_path, 3)
    fill(folder)
    other._look()
    assert closed(folder)
    assert not other.close(lambda _: pytest.fail("a manifest is there"))
    (tmp_path / "s00000.claim").touch()
    (tmp_path / f"{'0' * 32}.finished").touch()
    again = of(tmp_path, 3)
    assert not again.close(lambda _: pytest.fail("a manifest is there"))
    assert left_over(tmp_path) == {NAME}
    before = tmp_path.stat().st_mtime_ns
    assert not of(tmp_path, 3).close(lambda _: pytest.fail("a manifest is there"))
    assert tmp_path.stat().st_mtime_ns == before, "a finished folder is written to"


@pytest.mark.parametrize("finished", [False, True])
def test_another_task_is_refused(tmp_path, finished):
    """By the files there, by the manifest; not by what a task that has finished nothing left."""
    of(tmp_path, 2)
    folder = of(tmp_path, 2, precision="bf16")
    write(folder, next(next(folder.passes(0))))
    if finished:
        fill(folder)
        folder.close(lambda written: _bf16([file.entry for file in written]))
    for changes in ({}, {"fingerprint": "g", "precision": "bf16"}):
        with pytest.raises(ConfigError, match="choose another folder"):
            of(tmp_path, 2, **changes)
    assert len(of(tmp_path, 2, precision="bf16").finished) == 1 + finished


def test_another_task_is_refused_while_one_is_at_work(tmp_path):
    """At once, though nothing is finished and no shard claimed; any number of processes work for one task."""
    first, second = of(tmp_path, 2), of(tmp_path, 2)
    del first
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"is being filled by another `tokenize`.*choose another folder"):
            of(tmp_path, 2, precision="bf16")
    fill(second)
    assert closed(second) and left_over(tmp_path) == {NAME}


def test_what_nobody_finished_anything_of_is_taken_over(tmp_path):
    left = of(tmp_path, 2)
    next(next(left.passes(0))).release()  # killed
    del left
    taken = of(tmp_path, 2, precision="bf16")
    with pytest.raises(ConfigError, match="is being filled by another"):
        of(tmp_path, 2)
    fill(taken)
    assert taken.close(lambda written: _bf16([file.entry for file in written])) and left_over(tmp_path) == {NAME}


@pytest.mark.parametrize("bytes_left", [0, 40])
@pytest.mark.parametrize("stopped", [True, False])
def test_a_cut_file_is_named_at_the_beginning(tmp_path, bytes_left, stopped):
    """With what makes it anew; after a run that was stopped, and where other files were copied to."""
    folder = of(tmp_path, 3)
    for claim in itertools.islice(next(folder.passes(0)), 2):
        write(folder, claim)
    path = folder.path(1)
    del folder
    os.truncate(path, bytes_left)
    if not stopped:
        for other in [*tmp_path.glob("*.finished"), tmp_path / TASK]:
            other.unlink()
    what = f"was cut to {bytes_left} of more than .*" if stopped else "is damaged, or no token file"
    with pytest.raises(ConfigError, match=rf"s00001\.safetensors {what}: remove it and run `tokenize` again"):
        of(tmp_path, 3)
    assert stopped or not [other for other in tmp_path.iterdir() if other.suffix != ".safetensors"], "as it was found"
    path.unlink()
    again = of(tmp_path, 3)
    fill(again)
    assert closed(again)


def test_the_smaller_files_of_another_task_are_not_called_cut(tmp_path):
    folder = of(tmp_path, 2)
    write(folder, next(next(folder.passes(0))))
    larger = TokenFolder(tmp_path, folder.images, IDENTITY, folder.policy, 8)
    del folder
    with pytest.raises(ConfigError, match="choose another folder"):
        larger.begin()


@pytest.mark.parametrize("told", [True, False])
def test_a_file_that_is_none_is_named_with_its_cure(tmp_path, told):
    folder = of(tmp_path, 2)
    fill(folder)
    folder.path(1).write_bytes(b"\0" * folder.path(1).stat().st_size)
    if not told:
        (tmp_path / TASK).unlink()
    with pytest.raises(ConfigError, match=r"s00001.* damaged.*: remove it and run `tokenize` again"):
        closed(of(tmp_path, 2))


def test_least_bytes_are_those_of_a_file(tmp_path):
    folder = of(tmp_path, 1)
    write(folder, next(next(folder.passes(0))))
    levels, checks, header = 3 * SAMPLES, 8 * SAMPLES, 2048
    least = least_bytes(1, SAMPLES, 2)
    assert least + levels + checks < folder.path(0).stat().st_size < least + levels + checks + header


def test_a_set_of_images_is_no_place_for_tokens(tiny, caplog):
    with pytest.raises(ConfigError, match="train is a set of images, not of tokens: choose another folder") as raised:
        of(tiny.folder / "shards" / "train", 2)
    assert "remove" not in str(raised.value) and not caplog.records


def _bf16(entries: list) -> TokenManifest:
    tokenizer = {**IDENTITY, "precision": "bf16"}
    return TokenManifest(shards=entries, tokenizer=tokenizer, policy={"seed": 0}, num_views=1, provenance={})


def test_a_damaged_manifest_is_named_and_made_anew(tmp_path):
    folder = of(tmp_path, 2)
    fill(folder)
    closed(folder)
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[:-30])
    with pytest.raises(ConfigError, match=r"or remove .*manifest\.json, and `tokenize` makes it anew"):
        of(tmp_path, 2)
    (tmp_path / NAME).unlink()
    assert closed(of(tmp_path, 2))
    assert (tmp_path / NAME).read_bytes() == whole


class Asked(ViewCutter):
    """Says which process was asked."""

    def __getitem__(self, piece: Piece):
        return piece, os.getpid()


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_live_across_shards_and_ask_for_no_more_than_they_can_hold(tiny, workers):
    images = ImageSet(tiny.folder / "shards" / "train")
    cutter = Asked(images=images, policy=ViewPolicy(), num_views=1, size=(8, 8), resample="lanczos")
    asked: list[int] = []

    def pieces(count: int) -> Iterator[Piece]:
        for n in range(count):
            asked.append(n)
            yield Piece(n, 0, 1)

    with ViewLoader(cutter, workers=workers, prefetch=2) as loader:
        processes = set()
        for _ in range(3):
            asked.clear()
            for n, (piece, process) in enumerate(loader.load(pieces(20))):
                assert piece.shard == n and len(asked) <= n + 1 + 2 * workers
                processes.add(process)
    assert len(processes) == max(1, workers) and (os.getpid() in processes) == (workers == 0)
    assert not multiprocessing.active_children()


def test_views_are_drawn_piece_by_piece_as_for_the_whole_shard(tiny):
    images, policy = ImageSet(tiny.folder / "shards" / "train"), ViewPolicy(seed=7)
    index = images.index(1)
    cutter = ViewCutter(images=images, policy=policy, num_views=3, size=(8, 8), resample="lanczos")
    found = [cutter.cut(Piece(1, first, min(first + 3, len(index)))) for first in range(0, len(index), 3)]
    assert np.array_equal(np.concatenate([batch.keys for batch in found]), index.key_hash)
    for k in range(3):
        whole = draw_views(policy, index.key_hash, k, index.width, index.height, index.greys)
        for name in FIELDS:
            parts = np.concatenate([getattr(batch.views, name)[k] for batch in found])
            assert np.array_equal(parts, getattr(whole, name)) and parts.dtype == getattr(whole, name).dtype, name


def linked(images: Path, out: Path, count: int) -> Path:
    """A set of `count` shards that are one and the same."""
    content = json.loads((images / NAME).read_text())
    entry = content["shards"][0]
    out.mkdir()
    for n in range(count):
        for suffix in (".tar", ".index.safetensors"):
            os.link(images / f"{entry['name']}{suffix}", out / f"s{n:04d}{suffix}")
    content["shards"] = [{**entry, "name": f"s{n:04d}"} for n in range(count)]
    content.pop("digest")
    (out / NAME).write_text(json.dumps(content))
    return out


def test_a_whole_run_calls_in_proportion_to_its_shards(tiny, tmp_path, monkeypatch, counted):
    """Twice as many shards, at most twice as many opens, listings and stats, whatever is inside of a shard."""
    monkeypatch.setattr(tokenize.Task, "tokens", lambda task, batch: np.zeros((2, len(batch.bad), 16), np.uint16))
    monkeypatch.setattr(tokenize, "_provenance", lambda task: {})
    calls = []
    for count in (8, 16):
        images = linked(tiny.folder / "shards" / "train", tmp_path / f"images{count}", count)
        words = [f"data.images={images}", f"data.tokens={tmp_path}/{count}", "data.heldout_images=", "loader.workers=0"]
        config = load_config(str(tiny.config), [*words, "data.heldout_tokens=", "view.num_views=2"])
        counted.clear()
        assert tokenize.run(config) == 0
        calls.append(counted.total())
    assert calls[1] <= 2 * calls[0] and calls[1] <= 16 * 40


def test_an_error_ends_the_workers(tiny, tmp_path, monkeypatch):
    """They obey no signal of others, so whoever leaves them would never end."""

    def failing(task: object, batch: object) -> None:
        raise ConfigError("no more")

    monkeypatch.setattr(tokenize.Task, "tokens", failing)
    words = [f"data.tokens={tmp_path}/train", "data.heldout_images=", "data.heldout_tokens=", "loader.workers=2"]
    with pytest.raises(ConfigError, match="no more"):
        tokenize.run(load_config(str(tiny.config), words))
    assert not multiprocessing.active_children()
