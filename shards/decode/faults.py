"""What is wrong with an image, in one exception, and what Pillow's parsers raise where it is."""

import struct

from PIL import Image

from beitforge.shards.errors import ShardError

MAX_PIXELS = 2**27  # of an image; more are not decoded

# What Pillow's parsers raise on damaged input, found by fuzzing each format.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    EOFError,
    IndexError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    Image.DecompressionBombError,
)


class ImageError(ShardError):
    """An image that cannot be used; the message is the reason."""
