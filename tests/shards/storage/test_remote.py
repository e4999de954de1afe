"""Sets behind URLs: bit for bit the batches of the folder, whatever the network does; and a cache within its size."""

import contextlib
import dataclasses
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from fsspec.config import conf

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.data.batches import evaluation_batches, training_batches
from beitforge.pipeline.data.pretraining import DataSource, evaluation, pretraining
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.stages import tokenize
from beitforge.shards.errors import ShardError
from beitforge.shards.format.manifest import read_token_manifest
from beitforge.shards.storage import remote, retry
from beitforge.shards.storage.cache import Cache
from beitforge.shards.storage.remote import Missing, Remote
from beitforge.shards.stream.image_set import DamagedSample, ImageSet, Reading
from beitforge.shards.stream.order import Order, OrderPolicy
from tests.conftest import ROOT
from tests.shards.storage.servers import Faults, faulty, http_server, s3_server
from tests.shards.stream.test_stream import split

GLOBAL, STEPS = 12, 9  # two epochs of the tiny set and a bit
EVERYTHING = Faults(
    seed=3, error=0.08, reset=0.06, slow=0.04, truncate=0.06, shorten=0.06, corrupt=0.1, pause_seconds=0.05
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A store of these tests recovers at once; workers inherit it."""
    monkeypatch.setattr(retry, "PAUSES", (0.01, 0.02, 0.05, 0.1, 0.1, 0.1))


@contextlib.contextmanager
def bucket(folder: Path, faults: Faults | None = None) -> Iterator[str]:
    """An S3 server with the files of `folder` in a bucket, and fsspec's configuration set to find it."""
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(s3_server(folder, "images"))
        if faults is not None:
            endpoint = stack.enter_context(faulty(endpoint, faults))[0]
        known = {
            "key": "test",
            "secret": "test",
            "endpoint_url": endpoint,
            "client_kwargs": {"region_name": "us-east-1"},
        }
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setitem(conf, "s3", known)
        remote._system.cache_clear()
        yield "s3://images"
    remote._system.cache_clear()


def tiny_config(tiny, root: str, cache: Path, *overrides: str) -> Config:
    where = [f"data.images={root}/shards/train", f"data.tokens={root}/tokens/train"]
    return load_config(
        str(tiny.config), [*where, f"data.cache={cache}", "loader.chunk=4", "loader.window=2", *overrides]
    )


def batches(config: Config, source: DataSource, ranks: int, workers: int, first: int = 0) -> list[tuple]:
    """Every sample of the steps from `first` on, in sample order."""
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, workers=workers))
    rows = []
    for rank in range(ranks):
        found = training_batches(
            config,
            source,
            first_sample=first * GLOBAL,
            global_batch=GLOBAL,
            micro=GLOBAL // ranks // 2,
            rank=rank,
            world=ranks,
            steps=STEPS - first,
        )
        for batch in found:
            assert not batch.bad
            rows += split(batch)
    return sorted(rows, key=lambda row: row[0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2)])
def test_the_same_batches_over_http(tiny, tmp_path, ranks, workers):
    local = tiny_config(tiny, str(tiny.folder), tmp_path)
    expected = batches(local, pretraining(local), 1, 0)
    with http_server(tiny.folder) as url:
        config = tiny_config(tiny, url, tmp_path / "cache")
        source = pretraining(config)
        assert batches(config, source, ranks, workers) == expected
        assert batches(config, source, ranks, workers, first=4) == [row for row in expected if row[0] >= 4 * GLOBAL]
        assert (source.images, source.tokens) == (pretraining(local).images, pretraining(local).tokens)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["http", "s3"])
def test_the_same_batches_over_a_bad_network(tiny, tmp_path, kind, seed):
    """500s, resets, pauses, short and truncated answers, flipped bytes: bit for bit the local batches."""
    local = tiny_config(tiny, str(tiny.folder), tmp_path)
    expected = batches(local, pretraining(local), 1, 0)
    faults = dataclasses.replace(EVERYTHING, seed=seed)
    with contextlib.ExitStack() as stack:
        if kind == "s3":
            url = stack.enter_context(bucket(tiny.folder, faults))
        else:
            url, counts = stack.enter_context(faulty(stack.enter_context(http_server(tiny.folder)), faults))
        config = tiny_config(tiny, url, tmp_path / "cache")
        assert batches(config, pretraining(config), 2, 1) == expected
        if kind == "http":
            assert sum(counts().values()) - counts()["requests"] >= 5, "the network was not bad"


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_what_is_not_there_is_one_line(tiny, tmp_path, kind):
    serve = bucket if kind == "s3" else http_server
    with serve(tiny.folder) as url:
        with pytest.raises(ShardError, match=rf"{url}/nowhere/shards/train has no manifest\.json, so it is unfinished"):
            pretraining(tiny_config(tiny, f"{url}/nowhere", tmp_path / "cache"))
        with pytest.raises(Missing, match=f"{url}/shards/x is not there"):
            Remote(f"{url}/shards/").whole("x", 100)


def test_a_store_that_does_not_answer_is_fatal_and_named(tmp_path):
    """Never skipped: that would change the order."""
    with pytest.raises(ShardError, match=r"cannot read http://127.0.0.1:9/x/manifest.json \(.*check the address"):
        ImageSet("http://127.0.0.1:9/x", Cache(tmp_path, 10**9))


def test_an_unknown_scheme_is_one_line(tmp_path):
    with pytest.raises(ShardError, match=r"nosuch://x cannot be read by fsspec: .*nosuch"):
        ImageSet("nosuch://x", Cache(tmp_path, 10**9))


@pytest.fixture(scope="module")
def served(tiny) -> Iterator[str]:
    with http_server(tiny.folder) as url:
        yield url


def kept(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("*/*") if path.parent.name != ".locks")


def test_a_image_damaged_at_its_source_is_a_bad_sample(tiny, tmp_path):
    """Fetched again and again, then replaced and counted like any other."""
    shutil.copytree(tiny.folder / "shards", tmp_path / "shards")
    index = ImageSet(tiny.folder / "shards" / "train").index(0)
    tar = tmp_path / "shards" / "train" / "shard-000000.tar"
    with open(tar, "r+b") as file:
        file.seek(int(index.image_offset[3]) + 60)
        file.write(b"xxxx")
    with http_server(tmp_path / "shards") as url:
        images = ImageSet(f"{url}/train", Cache(tmp_path / "cache", 10**9), chunk=4)
        with pytest.raises(DamagedSample, match="checksum"):
            images.read(0, 3)
        assert images.read(0, 2) == ImageSet(tiny.folder / "shards" / "train").read(0, 2)


def test_an_index_damaged_at_its_source_is_refused(tiny, tmp_path):
    shutil.copytree(tiny.folder / "shards" / "train", tmp_path / "train")
    path = tmp_path / "train" / "shard-000001.index.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with (
        http_server(tmp_path) as url,
        pytest.raises(ShardError, match=r"shard-000001.index.safetensors is not the file"),
    ):
        ImageSet(f"{url}/train", Cache(tmp_path / "cache", 10**9)).index(1)


@pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
def test_damage_in_the_cache_is_mended_and_logged(tiny, served, tmp_path, caplog, how):
    """Disks of nodes break too."""
    config = tiny_config(tiny, served, tmp_path / "cache")
    expected = batches(config, pretraining(config), 1, 0)
    for path in kept(tmp_path / "cache"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes({"cut": data[: len(data) // 3], "flipped": data, "empty": b""}[how])
    with caplog.at_level(logging.WARNING):
        assert batches(config, pretraining(config), 1, 0) == expected
    assert "fetching it again" in caplog.text


def test_damage_in_the_cache_and_on_the_way(tiny, tmp_path):
    """What comes instead of a damaged image may be damaged too: the third try has it."""
    cache = Cache(tmp_path / "cache", 10**9)
    expected = ImageSet(tiny.folder / "shards" / "train").read(0, 3)
    with http_server(tiny.folder) as upstream, faulty(upstream, Faults(seed=1, corrupt=1)) as (url, counts):
        assert ImageSet(f"{upstream}/shards/train", cache, chunk=1).read(0, 3) == expected
        (part,) = (path for path in kept(tmp_path / "cache") if path.suffix == ".part")
        part.write_bytes(bytes(len(expected)))
        images = ImageSet(f"{upstream}/shards/train", cache, chunk=1)
        images.folder = Remote(f"{url}/shards/train")
        assert images.read(0, 3) == expected
        assert counts()["corrupt"] == 1 and counts()["requests"] == 2


def test_partial_files_of_killed_runs_are_harmless(tiny, served, tmp_path):
    """Never read; and gone once the cache is opened."""
    config = tiny_config(tiny, served, tmp_path / "cache")
    expected = batches(config, pretraining(config), 1, 0)
    stale = []
    for path in kept(tmp_path / "cache"):
        stale.append(path.with_name(f"{path.name}.partial-0badc0de"))
        path.rename(stale[-1])
        stale[-1].write_bytes(b"half of it")
    assert batches(config, pretraining(config), 1, 0) == expected
    assert stale and not any(path.exists() for path in stale)


def test_a_second_run_asks_the_network_for_nothing_but_manifests(tiny, tmp_path):
    """What fits stays for the next epoch, rank and run."""
    with http_server(tiny.folder) as upstream, faulty(upstream, Faults(seed=0)) as (url, counts):
        config = tiny_config(tiny, url, tmp_path / "cache")
        expected = batches(config, pretraining(config), 1, 0)
        first = counts()["requests"]
        assert batches(config, pretraining(config), 1, 0) == expected
        assert counts()["requests"] - first == 2
        chunks = sum(-(-shard.samples // 4) for shard in pretraining(config).stream.images.manifest.shards)
        assert first == 2 * 2 + chunks + 2 * 4, "each manifest, its columns, chunk, index and token file once"


@pytest.mark.parametrize("bytes_of_cache", [40_000, 180_000, 10**9])
def test_the_cache_keeps_its_size(tiny, served, tmp_path, bytes_of_cache):
    """Too small for a chunk beside the indexes and tokens, for the set, for nothing: the same batches, and never more
    on the disk than allowed."""
    config = tiny_config(tiny, served, tmp_path / "cache", f"data.cache_gb={bytes_of_cache / 1e9}")
    local = tiny_config(tiny, str(tiny.folder), tmp_path)
    assert batches(config, pretraining(config), 2, 1) == batches(local, pretraining(local), 1, 0)
    assert sum(path.stat().st_size for path in kept(tmp_path / "cache")) <= bytes_of_cache


def test_evaluation_reads_urls_too(tiny, served, tmp_path):
    config = tiny_config(tiny, served, tmp_path / "cache")

    def rows(where: str) -> list[bytes]:
        found = evaluation_batches(config, evaluation(config, where), samples=10, micro=4, rank=0, world=1)
        return [batch.pixels.numpy().tobytes() for batch in found]

    assert rows(f"{served}/shards/test") == rows(str(tiny.folder / "shards" / "test"))


def test_what_is_used_last_makes_room(tiny, served, tmp_path):
    """With room for half the set, what stays after an epoch's end are the chunks that come soonest."""
    set_of = f"{served}/shards/train"
    order = Order(
        [shard.samples for shard in ImageSet(set_of, Cache(tmp_path / "c", 10**9)).manifest.shards],
        OrderPolicy(chunk=4, window=2, lanes=2),
    )
    cache = Cache(tmp_path / "cache", 180_000)
    images = ImageSet(set_of, cache, chunk=4)
    images.reading = Reading(order, range(1), 1, 0)
    samples = np.arange(100)
    _, shards, rows = order.locate(samples)
    for sample, shard, row in zip(samples.tolist(), shards.tolist(), rows.tolist(), strict=True):
        images.reading.sample = sample
        images.read(shard, row)
        parts = [f"{path.parent.name}/{path.name}" for path in kept(tmp_path / "cache") if path.suffix == ".part"]
        uses = dict(zip(parts, images._uses(parts).tolist(), strict=True))
        mine = images._entry(shard, row // 4)
        if mine in uses:
            assert uses[mine] == sample, "what is being read is in use"
    everything = {images._entry(s, c) for s, c in zip(shards.tolist(), (rows // 4).tolist(), strict=True)}
    assert 3 < len(parts) < len(everything)
    all_uses = dict(zip(sorted(everything), images._uses(sorted(everything)).tolist(), strict=True))
    assert np.mean([all_uses[part] for part in parts]) < np.mean([all_uses[part] for part in everything - set(parts)])


def test_tokens_are_made_of_remote_images(tiny, served, tmp_path):
    """The same tokens, from an image set that is read once and in turn; with room for a few chunks."""
    where = [f"data.images={served}/shards/train", f"data.tokens={tmp_path / 'tokens'}", "data.heldout_images="]
    where += ["data.heldout_tokens=", f"data.cache={tmp_path / 'cache'}", "data.cache_gb=0.0001"]
    assert tokenize.run(load_config(str(tiny.config), where)) == 0
    ours, theirs = (read_token_manifest(folder) for folder in (tmp_path / "tokens", tiny.folder / "tokens" / "train"))
    assert ours.fingerprint == theirs.fingerprint


def test_tokens_are_written_into_a_folder(tiny, served):
    where = [f"data.tokens={served}/tokens/new", "data.heldout_images=", "data.heldout_tokens="]
    with pytest.raises(ConfigError, match="writes into a folder"):
        tokenize.run(load_config(str(tiny.config), where))


@pytest.mark.parametrize("verb", ["verify", "stats"])
def test_verbs_for_folders_say_so(served, verb):
    command = [sys.executable, "-m", "beitforge", verb, f"{served}/shards/train"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is a URL: this verb reads folders of this machine alone" in done.stderr


def test_the_process_that_fetches_ahead_ends_with_its_own(tiny, served, tmp_path):
    """However it ends: nothing is left to fill a disk."""
    code = """if True:
        import os, sys, time
        from beitforge.pipeline.config.loading import load_config
        from beitforge.pipeline.data.batches import training_batches
        from beitforge.pipeline.data.pretraining import pretraining
        config = load_config(sys.argv[1], sys.argv[2:])
        source = pretraining(config)
        shape = dict(first_sample=0, global_batch=12, micro=12, rank=0, world=1, steps=10**6)
        batches = training_batches(config, source, **shape)
        next(batches)
        print(os.getpid(), flush=True)
        time.sleep(60)
    """
    words = [f"data.images={served}/shards/train", f"data.tokens={served}/tokens/train", "loader.workers=1"]
    words += [f"data.cache={tmp_path / 'cache'}"]
    command = [sys.executable, "-c", code, str(tiny.config), *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2, "a worker, and one that fetches ahead"
        process.kill()
        process.wait()
        _, left = psutil.wait_procs(children, timeout=30)
        assert not left
