"""`tokenize CONFIG`: image shards and a tokenizer become token shards."""

import argparse
import os

from beitforge.pipeline.cluster import launching
from beitforge.pipeline.cluster.launching import add_arguments as add_arguments
from beitforge.pipeline.cluster.signals import StopRequest, end_with_launcher

HELP = "compute token shards; run it on any number of processes and machines, finished shards are skipped"


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks, or with --rank be one of them."""
    if not arguments.rank:
        return launching.launch(arguments, lambda folder: (folder / "manifest.json").exists())
    config = launching.rank_config(arguments)
    from beitforge.pipeline.stages import tokenize

    StopRequest()
    if "LOCAL_RANK" in os.environ:
        end_with_launcher()
    return tokenize.run(config)
