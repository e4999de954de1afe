"""The command line: `beitforge VERB …`. Each verb is one module of pipeline/commands and one line of VERBS.

Help and refused settings are instant: a command module imports nothing heavy until its `run` is called.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from beitforge.pipeline.cluster.error_reporting import USER_ERRORS, report, user_message
from beitforge.pipeline.console import program_name

# verb: module of pipeline/commands, in the order of the help
VERBS = {
    "demo": "demo",
    "pack": "pack",
    "index": "index",
    "verify": "verify",
    "stats": "stats",
    "simulate": "simulate",
    "tokenizer": "tokenizer",
    "import-tokenizer": "import_tokenizer",
    "tokenize": "tokenize",
    "pretrain": "pretrain",
    "finetune": "finetune",
    "settings": "settings",
    "plan": "plan",
    "doctor": "doctor",
    "slurm": "slurm",
    "stop": "stop",
    "watch": "watch",
    "replay": "replay",
    "report": "report",
    "probe": "probe",
    "evaluate": "evaluate",
    "export": "export",
    "import": "import_encoder",
}
# package: the extra of pyproject.toml that installs it
_EXTRAS = dict.fromkeys(("torch", "deepspeed", "scipy", "tensorboard"), "train")
_EXTRAS |= {"skimage": "demo", "sklearn": "demo", "timm": "finetune", "fsspec": "remote", "wandb": "wandb"}


def load_command(verb: str) -> ModuleType:
    """The module of a verb: HELP, one line; add_arguments(parser); run(arguments), which returns the exit code; and
    where options need more than argparse does, parse(parser, words)."""
    return importlib.import_module(f"beitforge.pipeline.commands.{VERBS[verb]}")


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, and its verb. A wrong one ends the process with a usage and exit code 2."""
    verb = words[0] if words else ""
    if verb in ("-h", "--help", "help"):
        print(_overview())
        raise SystemExit(0)
    if verb == "--version":
        from beitforge import __version__

        print(f"beitforge {__version__}")
        raise SystemExit(0)
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else "`beitforge --help` lists the verbs"
        problem = f"there is no verb {verb!r}" if verb else "no verb is given"
        print(f"usage: beitforge VERB …\nerror: {problem}; {hint}", file=sys.stderr)
        raise SystemExit(2)
    command = load_command(verb)
    parser = argparse.ArgumentParser(
        prog=f"beitforge {verb}",
        description=command.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parse = getattr(command, "parse", argparse.ArgumentParser.parse_intermixed_args)
    arguments = parse(parser, list(words[1:]))
    arguments.verb = verb
    return arguments


def _overview() -> str:
    lines = ["usage: beitforge VERB …        (beitforge VERB --help: the options of a verb)", ""]
    lines += [f"  {verb:18}{load_command(verb).HELP}" for verb in VERBS]
    return "\n".join([*lines, "", "  --version         the version of beitforge"])


def execute(arguments: argparse.Namespace) -> int:
    """Run a verb and return its exit code.

    An error that a user, a shard or a disk caused, or a package that is missing, is one line on stderr and code 2.
    """
    try:
        code = load_command(arguments.verb).run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        print(
            f"error: `{program_name()} {arguments.verb}` needs {package}, which is not installed for {sys.executable}: "
            f"pip install 'beitforge[{_EXTRAS[package]}]'",
            file=sys.stderr,
        )
        return 2
    except USER_ERRORS as error:
        if not user_message(error):
            raise
        return report(error)


def main(words: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    arguments = parse_arguments(sys.argv[1:] if words is None else words)
    if getattr(arguments, "rank", False):  # torch's C++ says at length, frame by frame, what its errors say as well
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = execute(arguments)
    if getattr(arguments, "rank", False) and arguments.verb != "tokenize":
        from beitforge.pipeline.cluster.launching import end_process

        end_process(code)
    return code
