"""How often were processes killed and foreign files harmed, and what came of it? The tests that do so, counted.

`BEITFORGE_NIGHTLY=1 ./launch.sh bench attacks` runs their long form, for an hour and more.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.results import write

ROOT = Path(__file__).resolve().parents[2]
SUITES = {
    "kills of every command that writes": "tests/pipeline/test_kills_everywhere.py",
    "harmed shard sets": "tests/shards/test_fuzz.py",
    "harmed configs, run folders, weights, pickles": "tests/pipeline/test_fuzz.py",
    "harmed checkpoints whose digests fit": "tests/pipeline/checkpoints/test_fuzz.py",
}
_TRIED = re.compile(r"^tried (\d+) ", re.MULTILINE)
_REFUSED = re.compile(r"(\d+) of them refused")
_FAILED = re.compile(r"(\d+) failed")


def main() -> None:
    """Run each suite and add up what it says."""
    rows = []
    for what, file in SUITES.items():
        begun = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", file]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        counts = [int(count) for count in _TRIED.findall(done.stdout)]
        if not counts:
            sys.exit(f"error: {file} tried nothing:\n{done.stdout[-2000:]}")
        failed = _FAILED.search(done.stdout)
        rows.append(
            {
                "attack": what,
                "kinds": len(counts),
                "cases": sum(counts),
                "ended in one line": sum(map(int, _REFUSED.findall(done.stdout))) or "–",
                "tests failed": int(failed[1]) if failed else 0,
                "seconds": round(time.monotonic() - begun),
            }
        )
    form = "long (BEITFORGE_NIGHTLY=1)" if os.environ.get("BEITFORGE_NIGHTLY") else "ordinary"
    notes = [
        f"The {form} form of the tests. A kill is SIGKILL to one process or to all at a random moment; the command is "
        "then started again until it ends, and what it has left is byte for byte what an unbroken call leaves. A "
        "harmed file ends in a value or in one line, in bounded time and memory."
    ]
    write("attacks", "what was killed and harmed, and how did it end?", rows, {}, notes)


if __name__ == "__main__":
    main()
