"""`tokenizer CONFIG`: trains a dVAE."""

import argparse

from beitforge.pipeline.cluster import launching
from beitforge.pipeline.cluster.launching import add_arguments as add_arguments

HELP = "train a dVAE on the image shards and write it to data.tokenizer; resumes like pretrain"


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks, or with --rank be one of them."""
    if not arguments.rank:
        return launching.launch(arguments)
    config, stop = launching.start_rank(arguments)
    from beitforge.pipeline.stages import tokenizer

    return tokenizer.run(config, stop)
