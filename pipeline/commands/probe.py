"""`probe RUN SHARDS [TEST]`: k-NN and linear probes of a run's encoder."""

import argparse
from pathlib import Path

HELP = "measure an encoder by k-NN and linear probes on labelled shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The encoder, the labelled sets and the probes' settings."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder (its newest checkpoint), or an encoder")
    parser.add_argument("shards", metavar="SHARDS", help="labelled image shards to fit on")
    parser.add_argument("test", metavar="TEST", nargs="?", help="shards to test on (default: a fifth of SHARDS)")
    text = "images of each set at most, spread over the set (default 20000)"
    parser.add_argument("--samples", type=int, default=20_000, metavar="N", help=text)
    text = "share of each class's labels to fit on, in (0, 1] (default 1)"
    parser.add_argument("--label-share", type=float, default=1.0, metavar="SHARE", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of these labels (default 0)")
    parser.add_argument("--epochs", type=int, default=100, metavar="N", help="of the linear probes (default 100)")


def run(arguments: argparse.Namespace) -> int:
    """Print the results and write them into the run folder."""
    from beitforge.pipeline.stages import probe

    options = {name: getattr(arguments, name) for name in ("samples", "label_share", "seed", "epochs")}
    return probe.run(arguments.run, arguments.shards, arguments.test, probe.ProbeOptions(**options))
