"""What may not be in a text that a script, a command line, an environment file or a message will hold.

A line break in such a text begins a line of its own, which a shell or another program obeys; a dash at its start makes
it an option. `plain` and `operand` are asked at every door. Knows no setting, no SLURM and no ssh.
"""

import re

from beitforge.pipeline.errors import CONTROL, ConfigError

_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.-]*")
_ADDRESS = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.:-]*|[0-9A-Fa-f:]+(?:%[0-9A-Za-z_.-]+)?")
_SHOWN = 80  # characters of a value in a message
_DIGITS = 18  # of a whole number that a person types


def shown(value: object) -> str:
    """A value as a message quotes it: escaped, and cut where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4 * _SHOWN:
        return f"a number of about {int(value.bit_length() * 0.30103):,} digits"
    text = repr(value[: 4 * _SHOWN]) if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(str(value)):,} characters)"


def plain(text: str, what: str) -> str:
    """The text itself. Raises ConfigError where it holds a control character, a line separator of Unicode, or bytes
    that are no text. what: names the text in the message."""
    if found := CONTROL.search(text):
        code = ord(found[0])
        kind = "bytes that are no text" if 0xD800 <= code < 0xE000 else f"the control character U+{code:04X}"
        raise ConfigError(
            f"{what} is {shown(text)}, which holds {kind}; scripts, command lines and run folders take text of one "
            f"line: write it without"
        )
    return text


def operand(text: str, what: str) -> str:
    """As `plain`, of what a program gets as an argument: nor may it begin with a dash."""
    if plain(text, what).startswith("-"):
        raise ConfigError(
            f"{what} is {shown(text)}; a dash at its start would make it an option: for a folder write "
            f"{shown('./' + text)}, else a name without it"
        )
    return text


def host_name(text: str, what: str) -> str:
    """The name of a host, as ssh and pdsh take it: letters, digits, dots, dashes and underscores, after USER@ where
    that is given. Raises ConfigError for anything else."""
    if not _HOST.fullmatch(operand(text, what)):
        raise ConfigError(f"{what} is {shown(text)}; a host is a name or an IPv4 address, alone or as USER@HOST")
    return text


def address(text: str, what: str) -> str:
    """A name, an IPv4 or an IPv6 address to meet at. Raises ConfigError for anything else."""
    if not _ADDRESS.fullmatch(operand(text, what)):
        raise ConfigError(f"{what} is {shown(text)}; it must be the name or the address of a host")
    return text


def whole_number(text: str, what: str, low: int = 0, high: int = 10**_DIGITS) -> int:
    """A whole number in decimal digits, within its range. Raises ConfigError for anything else."""
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= _DIGITS and low <= int(digits) <= high):
        end = f"at least {low}" if high == 10**_DIGITS else f"{low} to {high}"
        raise ConfigError(f"{what} is {shown(text)}; it must be a whole number, {end}, or unset")
    return int(digits)
