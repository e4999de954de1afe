"""`pretrain CONFIG`: masked-image pretraining."""

import argparse

from beitforge.pipeline.cluster import launching
from beitforge.pipeline.cluster.launching import add_arguments as add_arguments

HELP = "pretrain an encoder; resumes from the newest complete checkpoint of train.run"


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks, or with --rank be one of them."""
    if not arguments.rank:
        return launching.launch(arguments)
    config, stop = launching.start_rank(arguments)
    from beitforge.pipeline.stages import pretrain

    return pretrain.run(config, stop)
