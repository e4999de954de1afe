"""tests.ranks believes of a job what is said of that job alone."""

import os
from types import SimpleNamespace

from tests.ranks import Server


def test_an_exit_code_is_not_that_of_an_earlier_process_of_the_same_id():
    """Ids come again after some ten thousand processes."""
    reads, writes = os.pipe()
    with open(reads, "rb", buffering=0) as stdout, open(writes, "wb", buffering=0) as said:
        server = Server.__new__(Server)
        server._process, server._pending, server._started, server.codes = SimpleNamespace(stdout=stdout), b"", [], {}
        said.write(b'{"started": 7}\n{"ended": 7, "code": 2}\n')
        server._read(1)
        assert server._started.pop() == 7 and server.wait(7, 0) == 2
        said.write(b'{"started": 7}\n')
        server._read(1)
        assert server._started.pop() == 7 and server.wait(7, 0) is None
        said.write(b'{"ended": 7, "code": 0}\n')
        assert server.wait(7, 1) == 0
