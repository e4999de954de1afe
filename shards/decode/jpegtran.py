"""JPEGs rewritten without loss so that a crop of them is decoded alone (shards.decode.regions), by jpegtran.

jpegtran decodes to coefficients and no further, and codes these again: baseline, with a restart marker at every MCU and
Huffman tables made for the image. What it wrote is taken where every decoder gives the same pixels as before.
"""

import io
import shutil
import subprocess

import numpy as np
from PIL import Image

from beitforge.shards.decode import codec, jpeg_faults, regions
from beitforge.shards.decode.codec import Header, ImageError
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import FLAG_JPEG, FLAG_PROGRESSIVE, FLAG_REGIONS

REWRITTEN = "rewritten for fast regions"
FROM_PROGRESSIVE = "progressive JPEG rewritten for fast regions"
ASIDE = "kept without fast regions"

_TOOL = ("jpegtran", "-restart", "1B", "-optimize", "-copy", "all")
_SECONDS = 300  # for one image
_INSTALL = "apt-get install libjpeg-turbo-progs, dnf install libjpeg-turbo-utils, or brew install jpeg-turbo"


def check_tool() -> None:
    """Raise ShardError where jpegtran is not installed, or is another program than libjpeg-turbo's."""
    if shutil.which(_TOOL[0]) is None:
        raise ShardError(f"--fast-regions needs the program jpegtran, and none is on PATH: {_INSTALL}")
    ramp = np.arange(24 * 40 * 3, dtype=np.uint32).reshape(24, 40, 3) % 251
    file = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).save(file, "JPEG", progressive=True, subsampling=2)
    if with_fast_regions(file.getvalue(), codec.read_header(file.getvalue()))[0] == file.getvalue():
        raise ShardError(
            f"--fast-regions needs libjpeg-turbo's jpegtran, and {shutil.which(_TOOL[0])} does not write a test image "
            f"as asked, without loss: {_INSTALL}"
        )


def with_fast_regions(data: bytes, header: Header) -> tuple[bytes, Header, str]:
    """An image that is in a set as it is stored for fast regions, its header then, and by name what became of it: the
    same bytes where it is none of which that can be made. Raises ShardError where jpegtran cannot be started."""
    if header.flags & FLAG_REGIONS:
        return data, header, REWRITTEN
    if not header.flags & FLAG_JPEG:
        return data, header, f"{ASIDE} ({header.format})"
    try:
        found = regions.with_table(_rewritten(data))
    except ImageError as error:
        return data, header, f"{ASIDE} ({error})"
    if found is None:
        return data, header, f"{ASIDE} (JPEG of another kind or sampling)"
    again = _if_equal(found, data, header.flags)
    if again is None or again.flags != header.flags & ~FLAG_PROGRESSIVE | FLAG_REGIONS:
        return data, header, f"{ASIDE} (not the same image when rewritten)"
    return found, again, FROM_PROGRESSIVE if header.flags & FLAG_PROGRESSIVE else REWRITTEN


def _rewritten(data: bytes) -> bytes:
    try:
        done = subprocess.run(_TOOL, input=data, capture_output=True, timeout=_SECONDS, check=False)
    except OSError as error:
        raise ShardError(f"jpegtran cannot be started ({error.strerror}): {_INSTALL}") from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"jpegtran took more than {_SECONDS} s") from error
    if done.returncode or done.stderr:
        raise ImageError("jpegtran does not take it")
    return done.stdout


def _if_equal(found: bytes, data: bytes, flags: int) -> Header | None:
    """The header of what was rewritten, if libjpeg has nothing against it and decoders give the pixels of `data`."""
    try:
        header, wanted = codec.read_header(found), codec.decode_whole(data, flags)
        both = codec.decode_whole(found, header.flags), codec.decode(found)
    except ImageError:
        return None
    equal = all(np.array_equal(wanted, pixels) for pixels in both)
    return header if equal and not jpeg_faults.warning(found) else None
