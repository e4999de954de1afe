"""The command `beitforge`, also as `python -m beitforge`."""

import os
import sys


def forget_working_folder() -> None:
    """Take the working folder, which `python -m` puts first, off the module search path.

    A folder called `kernels` or `datasets` there would otherwise hide an installed package of that name. Processes
    that this one spawns inherit the path.
    """
    safe = getattr(sys.flags, "safe_path", False)  # -P, from Python 3.11 on
    if not safe and sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(os.getcwd()):
        del sys.path[0]


def main() -> int:
    """Run the verb that the command line names. Returns the exit code."""
    from beitforge.pipeline.cli import main

    return main()


if __name__ == "__main__":
    forget_working_folder()
    sys.exit(main())
