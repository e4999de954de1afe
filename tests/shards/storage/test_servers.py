"""The servers that other tests read from: they serve, and the proxy does the harm it says, no other, and counts it."""

import contextlib
import dataclasses
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import fsspec
import pytest
from s3fs import S3FileSystem

from tests.cluster.cluster import until
from tests.conftest import ROOT
from tests.shards.storage.servers import Faults, faulty, http_server, s3_server

NAME = "train/00000.tar"
DATA = random.Random(5).randbytes(20_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    (path / NAME).parent.mkdir()
    (path / NAME).write_bytes(DATA)
    return path


@pytest.fixture(scope="module")
def web(folder: Path) -> Iterator[str]:
    with http_server(folder) as url:
        yield url


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[str]:
    with s3_server(folder, "shards") as endpoint:
        yield endpoint


def ask(url: str, path: str = NAME, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one request that nothing retries or decodes."""
    with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)) as connection:
        connection.request(method, f"/{path}", headers=headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()


def bucket(endpoint: str) -> S3FileSystem:
    """s3fs without its retries and without botocore's."""
    secret = {"key": "test", "secret": "test", "client_kwargs": {"region_name": "us-east-1"}}
    once = {"retries": {"max_attempts": 0}}
    files = S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True, config_kwargs=once, **secret)
    files.retries = 1
    return files


def test_files_over_http(web):
    files = fsspec.filesystem("http", skip_instance_cache=True)
    assert files.cat_file(f"{web}/{NAME}", 1000, 5000) == DATA[1000:5000]
    assert files.cat_file(f"{web}/{NAME}") == DATA
    assert files.ls(f"{web}/train", detail=False) == [f"{web}/{NAME}"]
    assert ask(web, Range="bytes=7-9")[0] == 206


def test_files_as_s3(s3):
    files = bucket(s3)
    assert files.cat_file(f"shards/{NAME}", start=1000, end=5000) == DATA[1000:5000]
    assert files.cat_file(f"shards/{NAME}") == DATA
    assert files.find("shards") == [f"shards/{NAME}"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", [NAME, "missing", ""])
@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=100-299"}, {"Range": "bytes=30000-"}])
def test_without_faults_a_proxy_changes_nothing(web, method, path, headers):
    with faulty(web, Faults(seed=0)) as (url, counts):
        status, told, body = ask(url, path, method, **headers)
    directly = ask(web, path, method, **headers)
    apart = {"Connection": "", "Date": "", "Transfer-Encoding": "", "Content-Length": str(len(body))}
    if method == "HEAD":
        apart["Content-Length"] = directly[1].get("Content-Length", "")
    assert (status, told | apart, body) == (directly[0], directly[1] | apart, directly[2])
    assert counts() == {**dict.fromkeys(counts(), 0), "requests": 1}


def test_s3_through_a_proxy_reads_and_writes(s3):
    with faulty(s3, Faults(seed=0)) as (endpoint, counts):
        files = bucket(endpoint)
        files.pipe_file("shards/written", DATA[:5000])
        assert files.cat_file("shards/written", start=10, end=20) == DATA[10:20]
        files.rm("shards/written")
        assert files.find("shards") == [f"shards/{NAME}"]
    assert counts()["requests"] >= 4


def test_errors(web):
    with faulty(web, Faults(seed=1, error=1)) as (url, counts):
        answers = [ask(url, method=method) for method in ("GET", "HEAD") * 5]
    assert {status for status, _, _ in answers} == {500, 503}
    assert not any(body for _, _, body in answers)
    assert counts()["error"] == counts()["requests"] == 10


def test_reset(web):
    with faulty(web, Faults(seed=1, reset=1)) as (url, counts), pytest.raises(ConnectionResetError):
        ask(url)
    assert counts()["reset"] == 1


def test_truncated(web):
    with faulty(web, Faults(seed=1, truncate=1)) as (url, _), pytest.raises(http.client.IncompleteRead) as caught:
        ask(url)
    assert caught.value.partial == DATA[:10_000]


def test_shortened(web):
    with faulty(web, Faults(seed=1, shorten=1)) as (url, _):
        assert ask(url)[2] == DATA[:10_000]
        status, headers, body = ask(url, Range="bytes=100-299")
    assert (status, headers["Content-Range"], body) == (206, "bytes 100-199/20000", DATA[100:200])


def test_corrupt(web):
    with faulty(web, Faults(seed=1, corrupt=1)) as (url, _):
        bodies = [ask(url)[2] for _ in range(5)]
    places = [[i for i, (a, b) in enumerate(zip(body, DATA, strict=True)) if a != b] for body in bodies]
    assert [len(place) for place in places] == [1, 0, 1, 0, 1]  # never twice running
    assert len({place[0] for place in places if place}) == 3


def test_slow(web):
    with faulty(web, Faults(seed=1, slow=1, pause_seconds=0.5)) as (url, counts):
        start = time.monotonic()
        assert ask(url)[2] == DATA
        assert time.monotonic() - start >= 0.5
        ask(url, method="HEAD")
    assert counts() == {**dict.fromkeys(counts(), 0), "requests": 2, "slow": 1}


@pytest.mark.parametrize("fault", ["error", "reset", "truncate"])
def test_what_readers_see(web, s3, fault):
    """The error classes a reader of shards has to expect."""
    with faulty(web, Faults(seed=1, **{fault: 1})) as (url, _):
        files = fsspec.filesystem("http", skip_instance_cache=True)
        with pytest.raises(aiohttp.ClientResponseError if fault == "error" else aiohttp.ClientPayloadError):
            files.cat_file(f"{url}/{NAME}", 1000, 5000)
    with faulty(s3, Faults(seed=1, **{fault: 1})) as (endpoint, counts):
        with pytest.raises(OSError if fault == "error" else aiohttp.ClientPayloadError):
            bucket(endpoint).cat_file(f"shards/{NAME}", start=1000, end=5000)
        assert counts()[fault] == counts()["requests"] == 1


def test_faults_follow_from_the_seed(web):
    seen = []
    for seed in (3, 3, 4):
        with faulty(web, Faults(seed=seed, error=0.3, shorten=0.3, corrupt=0.2)) as (url, counts):
            seen.append([ask(url) for _ in range(40)])
        errors = sum(status != 200 for status, _, _ in seen[-1])
        short = sum(status == 200 and len(body) < len(DATA) for status, _, body in seen[-1])
        assert (errors, short, 40) == (counts()["error"], counts()["shorten"], counts()["requests"])
        assert 0 < errors < 30 and 0 < short < 30
    facts = [[(status, body) for status, _, body in answers] for answers in seen]
    assert facts[0] == facts[1] != facts[2]


def test_many_at_once(web):
    with faulty(web, Faults(seed=3, error=0.5)) as (url, counts), ThreadPoolExecutor(32) as pool:
        statuses = [answer[0] for answer in pool.map(lambda _: ask(url), range(200))]
    assert counts()["requests"] == 200
    assert counts()["error"] == 200 - statuses.count(200)


def test_more_than_certain():
    with pytest.raises(ValueError, match=r"sum to 1\.1"):
        Faults(seed=0, error=0.6, slow=0.5)


def test_a_server_ends_with_its_test(folder):
    """Also with one that is killed."""
    code = f"with servers.http_server('{folder}') as url:\n print(url, flush=True)\n signal.pause()"
    command = [sys.executable, "-c", f"import signal\nfrom tests.shards.storage import servers\n{code}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        socket.create_connection(("127.0.0.1", port)).close()
        os.kill(process.pid, signal.SIGKILL)

    def refused() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    until(refused, 20)


def test_answers_are_late_as_asked_and_faults_stay_the_same():
    chances, plain, late = range(200), Faults(seed=1, error=0.3), Faults(seed=1, error=0.3, latency=(0.05, 0.02))
    assert [plain.drawn(random.Random(n)) for n in chances] == [late.drawn(random.Random(n)) for n in chances]
    waits = [late.late(random.Random(n)) for n in chances]
    assert 0.03 <= min(waits) < 0.04 < 0.06 < max(waits) <= 0.07
    assert plain.late(random.Random(0)) == 0
    assert Faults(**json.loads(json.dumps(dataclasses.asdict(late)))).late(random.Random(0)) == waits[0]
