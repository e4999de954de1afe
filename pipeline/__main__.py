"""The command line: `python -m pipeline VERB …`. Help and config errors are instant: stages import what is heavy."""

import argparse
import errno
import os
import sys
from pathlib import Path

from pipeline.config import ConfigError, load_config, to_size
from pipeline.signals import StopRequest

_CONFIG_VERBS = {
    "tokenizer": "train a dVAE on the image shards; writes data.tokenizer",
    "tokenize": "image shards + tokenizer → token shards; any number of processes, finished shards are skipped",
    "pretrain": "the training run; goes on by itself from the newest complete checkpoint of train.run",
}
_DEMO_WORDS = "your own pictures (default: sample photographs), and settings that win over configs/demo.yaml"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description="Pretrain BEiT from image shards.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in _CONFIG_VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.add_argument("config", metavar="CONFIG", help="a YAML file of configs/")
        sub.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings that win over the file")
    export = verbs.add_parser("export", help="encoder and head of a run for others; checked by loading them back")
    export.add_argument("run", metavar="RUN", type=Path, help="run folder, or an encoder that was exported or imported")
    export.add_argument("out", metavar="OUT", type=Path)
    export.add_argument(
        "--to", choices=("safetensors", "hf", "timm", "unilm"), default="safetensors", help="whose names and layout"
    )
    export.add_argument(
        "--finetune", action="store_true", help="a classifier without its head: mean pooling, own tables"
    )
    export.add_argument("--input-size", metavar="PIXELS", help="with --finetune: for pictures of 384 or 224x288")
    bring = verbs.add_parser(
        "import", help="a BEiT of transformers, timm or the released code becomes an encoder of ours"
    )
    bring.add_argument("source", metavar="SRC", type=Path, help="folder, or a .pth or .safetensors file")
    bring.add_argument(
        "out", metavar="OUT", type=Path, help="probe, report, export it, or pretrain with train.init=OUT"
    )
    bring.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings that win over what SRC says")
    tokens = verbs.add_parser("import-tokenizer", help="DALL-E's, FLAVA's or BEiT v2's tokenizer becomes one of ours")
    tokens.add_argument(
        "source", metavar="SRC", type=Path, help="encoder.pkl or its folder, a FLAVA folder, VQ-KD's .pth"
    )
    tokens.add_argument("out", metavar="OUT", type=Path, help="the folder for data.tokenizer")
    tokens.add_argument("--input-size", metavar="PIXELS", help="of the views it is given (default: as published)")
    probe = verbs.add_parser("probe", help="k-NN and linear probe of a run's encoder on labelled shards")
    probe.add_argument("run", metavar="RUN", type=Path, help="run folder; its newest checkpoint is probed")
    probe.add_argument("shards", metavar="SHARDS", type=Path, help="labelled image shards to fit on")
    probe.add_argument(
        "test", metavar="TEST", type=Path, nargs="?", help="shards to test on (default: a fifth of SHARDS)"
    )
    probe.add_argument("--samples", type=int, default=20_000, help="at most so many of each set (default 20000)")
    report = verbs.add_parser("report", help="RUN/report.html: curves, throughput, reconstructions, one file")
    report.add_argument("run", metavar="RUN", type=Path)
    demo = verbs.add_parser("demo", help="the whole job on this machine: pictures → … → report")
    demo.add_argument("words", metavar="DIR section.key=value", nargs="*", help=_DEMO_WORDS)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="where everything goes (default runs/demo)")
    return parser


def _arguments() -> argparse.Namespace:
    """argparse gives up on words that come after an option; `demo` takes them anywhere."""
    parser = _parser()
    arguments, rest = parser.parse_known_args()
    if rest and (arguments.verb != "demo" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.words += rest
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    """One verb; returns the exit code."""
    verb = arguments.verb
    if verb in _CONFIG_VERBS:
        config = load_config(arguments.config, arguments.overrides)
        stop = StopRequest()
        if verb == "tokenize":
            from pipeline.stages import tokenize

            return tokenize.run(config)
        stop.install()
        if verb == "pretrain":
            from pipeline.stages import pretrain

            return pretrain.run(config, lambda: stop.reason)
        from pipeline.stages import tokenizer

        return tokenizer.run(config, lambda: stop.reason)
    if verb in ("export", "import", "import-tokenizer"):
        return _exchange(arguments)
    if verb == "probe":
        from pipeline.stages import probe

        return probe.run(arguments.run, arguments.shards, arguments.test, arguments.samples)
    if verb == "report":
        from pipeline.stages import report

        return report.run(arguments.run)
    from pipeline.stages import demo

    folders = [word for word in arguments.words if "=" not in word]
    if len(folders) > 1:
        raise ConfigError(f"demo takes one folder of pictures, not {len(folders)}: {' '.join(folders)}")
    settings = [word for word in arguments.words if "=" in word]
    return demo.run(Path(folders[0]) if folders else None, arguments.out, settings)


def _exchange(arguments: argparse.Namespace) -> int:
    """Weights in and out."""
    if arguments.verb == "import":
        from pipeline.stages import import_encoder

        return import_encoder.run(arguments.source, arguments.out, arguments.overrides)
    size = to_size(arguments.input_size, "--input-size") if arguments.input_size else None
    if arguments.verb == "import-tokenizer":
        from pipeline.stages import import_tokenizer

        return import_tokenizer.run(arguments.source, arguments.out, size)
    from pipeline.stages import export

    return export.run(arguments.run, arguments.out, arguments.to, arguments.finetune, size)


def main() -> int:
    """Parse, run, and turn what a user or a disk caused into one line and exit code 2."""
    arguments = _arguments()
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except ConfigError as error:
        return _refuse(str(error))
    except ValueError as error:
        from shards.errors import ShardError

        if not isinstance(error, ShardError):
            raise
        return _refuse(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        return _refuse(f"{error.filename or 'a file'}: {error.strerror}; mend that, then run the same command again")


def _refuse(line: str) -> int:
    """Say it once, not once per rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {line}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
