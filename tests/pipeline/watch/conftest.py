"""A server that watches a run, for all tests of a file."""

import pytest

from tests.pipeline.watch.watching import lines_of, watching, write_run


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    with watching(write_run(tmp_path_factory.mktemp("watch"), lines_of(20, 100))) as server:
        yield server
