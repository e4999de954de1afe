"""One process of the benchmark of packing, which imports no more than what it measures."""

import importlib
import os
import sys
import time
from pathlib import Path


def main(what: str, folder: Path) -> None:
    """Do it, and print the CPU seconds that took, what memory is this process's own, and its most, in MB."""
    plan = importlib.import_module("beitforge.shards.pack.plan")
    importlib.import_module("beitforge.shards.pack.shard")
    started = time.process_time()
    kept = None
    if what == "scan":
        for entry in os.scandir(folder):
            for file in os.scandir(entry.path):
                file.stat(follow_symlinks=False)
    elif what == "plan":
        kept = plan.make_plan(folder, folder.with_suffix(".set"), plan.PackOptions())
    elif what == "webdataset":
        importlib.import_module("webdataset.writer")
    seconds = time.process_time() - started
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, shared, most = (int(status[name].split()[0]) / 1000 for name in ("RssAnon", "RssFile", "VmHWM"))
    print(len(kept.files) if kept else 0, len(kept.classes) if kept else 0, seconds, own, most - shared)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
