"""A process of test_gpu_runs.py: `python -m tests.pipeline.gpu_runs VERB …` is that verb of this project, as a rank
whose GPU is the simulated one. Last it prints what the host waited for, by how often, as JSON."""

import collections
import json
import os
import sys
import warnings

import pytest

from beitforge.pipeline.cli import execute, parse_arguments
from tests.simulated_gpu import replace_nccl, simulated_gpu


def main() -> None:
    warnings.simplefilter("ignore")
    os.environ["DS_ACCELERATOR"] = "cuda"  # a test before may have said cpu
    patches = pytest.MonkeyPatch()
    replace_nccl(patches)
    with simulated_gpu(patches) as gpu:
        code = execute(parse_arguments(sys.argv[1:]))
        print(json.dumps(collections.Counter(gpu.waits)), flush=True)
    sys.stdout.flush()
    os._exit(code)  # now and then gloo aborts when it is taken apart


if __name__ == "__main__":
    main()
