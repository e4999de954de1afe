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


def line_of(error: Exception) -> str:
    """What an error says, in one line: of a compilation not the source that it quotes, but what it came of; its kind
    where that says more."""
    while isinstance(error.__cause__, Exception) and getattr(error, "error_message", "") is None:
        error = error.__cause__
    words = " ".join(str(getattr(error, "error_message", None) or error).split())[:400]
    plain = words and isinstance(error, RuntimeError | ValueError | OSError)
    return words if plain else f"{type(error).__name__}: {words}".removesuffix(": ")
