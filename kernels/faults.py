"""What a kernel raises that cannot run here."""

import subprocess


def faults() -> tuple[type[Exception], ...]:
    """What comes of a kernel that cannot run. Triton's own errors share no base with others, and assertions and plain
    look-ups that fail are how it says that something of the system is not as it expects."""
    known: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
    known += (AssertionError, ImportError, OSError, subprocess.SubprocessError)
    try:
        from triton.compiler import errors as compiling
        from triton.runtime import errors as running
    except ImportError:
        return known
    found = [*vars(compiling).values(), *vars(running).values()]
    return (*known, *(kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception)))
