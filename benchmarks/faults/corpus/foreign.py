"""Damage to tars that nobody has indexed yet: a colleague's folder, copied badly or made wrongly.

Each function takes a generator and a folder of two whole tars (`make_tars`) and changes it. Flipped bits in images
are not among them: without a checksum nobody can know.
"""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.faults.corpus.damage import BLOCK, ends_of, filled, flipped, members_of, one_of
from benchmarks.faults.corpus.sets import encoded_image, rewrite

Damage = Callable[[np.random.Generator, Path], None]
Members = list[tuple[str, bytes]]

PER_TAR = 4
_FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def write_tar(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> None:
    """A plain tar of these members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rewrite(path, file.getvalue())


def make_tars(rng: np.random.Generator, folder: Path) -> dict[str, tuple[bytes, int]]:
    """Two tars of PER_TAR labelled samples in any of the tar formats, some with names too long for a plain header.

    Returns each key's image and label.
    """
    folder.mkdir(parents=True)
    truth = {}
    for turn, name in enumerate(("first", "second")):
        format, members = _FORMATS[int(rng.integers(3))], []
        long = "" if format == tarfile.USTAR_FORMAT or rng.integers(2) else "a long name " * 12
        for number in range(turn * PER_TAR, (turn + 1) * PER_TAR):
            data, extension = encoded_image(int(rng.integers(10**6)))
            key, label = f"{long}{number:04d}", int(rng.integers(10))
            truth[key] = data, label
            members += [(f"{key}.{extension}", data), (f"{key}.cls", str(label).encode())]
        write_tar(folder / f"{name}.tar", members, format)
    return truth


def some_tar(rng: np.random.Generator, folder: Path) -> Path:
    """One of the two tars."""
    return folder / ("first.tar", "second.tar")[int(rng.integers(2))]


def read_members(path: Path) -> Members:
    """Names and contents of a tar's members."""
    data = path.read_bytes()
    return [(member.name, data[member.offset_data : member.offset_data + member.size]) for member in members_of(data)]


def head_block(rng: np.random.Generator, data: bytes) -> int:
    """Where one of the blocks before a member's data begins: its header, or one of those that hold its long name."""
    member = one_of(rng, members_of(data))
    return member.offset + BLOCK * int(rng.integers((member.offset_data - member.offset) // BLOCK))


def cut_in_data(rng: np.random.Generator, folder: Path) -> None:
    path = some_tar(rng, folder)
    data = path.read_bytes()
    member = one_of(rng, members_of(data))
    rewrite(path, data[: member.offset_data + int(rng.integers(1, max(2, member.size)))])


def cut_on_boundary(rng: np.random.Generator, folder: Path) -> None:
    path = some_tar(rng, folder)
    data = path.read_bytes()
    rewrite(path, data[: one_of(rng, [*(m.offset for m in members_of(data)), ends_of(members_of(data)[-1])[1]])])


def cut_in_header(rng: np.random.Generator, folder: Path) -> None:
    path = some_tar(rng, folder)
    data = path.read_bytes()
    rewrite(path, data[: head_block(rng, data) + int(rng.integers(1, BLOCK))])


def cut_in_tail(rng: np.random.Generator, folder: Path) -> None:
    """In the zeros that end a tar: harmless as long as one whole block of them is left."""
    path = some_tar(rng, folder)
    data = path.read_bytes()
    rewrite(path, data[: int(rng.integers(ends_of(members_of(data)[-1])[1], len(data)))])


def zero_header(rng: np.random.Generator, folder: Path) -> None:
    path = some_tar(rng, folder)
    data = path.read_bytes()
    rewrite(path, filled(data, head_block(rng, data), bytes(BLOCK)))


def garbage_header(rng: np.random.Generator, folder: Path) -> None:
    path = some_tar(rng, folder)
    data = path.read_bytes()
    rewrite(path, filled(data, head_block(rng, data), rng.bytes(BLOCK)))


def flip_header(rng: np.random.Generator, folder: Path) -> None:
    """One bit in a member's own header, which has a checksum."""
    path = some_tar(rng, folder)
    data = path.read_bytes()
    place = one_of(rng, members_of(data)).offset_data - BLOCK + int(rng.integers(BLOCK))
    rewrite(path, filled(data, place, bytes([data[place] ^ (1 << int(rng.integers(8)))])))


def same_key(rng: np.random.Generator, folder: Path) -> None:
    """An image more under a key that is taken, in the same tar or in the other one."""
    path, source = some_tar(rng, folder), some_tar(rng, folder)
    name = one_of(rng, read_members(source))[0].rpartition(".")[0]
    data, extension = encoded_image(int(rng.integers(10**6)))
    members = read_members(path)
    members.insert(int(rng.integers(len(members) + 1)), (f"{name}.{extension}", data))
    write_tar(path, members, tarfile.PAX_FORMAT)


def torn_apart(rng: np.random.Generator, folder: Path) -> None:
    """A label stands away from its image, behind another sample."""
    path = some_tar(rng, folder)
    members = read_members(path)
    taken = members.pop(2 * int(rng.integers(PER_TAR)) + 1)
    places = [at for at in range(len(members) + 1) if not _beside(members, at, taken[0])]
    members.insert(one_of(rng, places), taken)
    write_tar(path, members, tarfile.PAX_FORMAT)


def _beside(members: Members, at: int, name: str) -> bool:
    key = name.rpartition(".")[0]
    return any(member.rpartition(".")[0] == key for member, _ in members[max(0, at - 1) : at + 1])


def swap_members(rng: np.random.Generator, folder: Path) -> None:
    """Two whole members change places; harmless where they are one sample's."""
    path = some_tar(rng, folder)
    members = read_members(path)
    a, b = rng.choice(len(members), 2, replace=False).tolist()
    members[a], members[b] = members[b], members[a]
    write_tar(path, members, tarfile.PAX_FORMAT)


def wrong_images(rng: np.random.Generator, folder: Path) -> None:
    """A sample without an image, or with two."""
    path = some_tar(rng, folder)
    members = read_members(path)
    at = 2 * int(rng.integers(PER_TAR))
    if rng.integers(2):
        del members[at]
    else:
        key = members[at][0].rpartition(".")[0]
        taken = {name.rpartition(".")[2] for name, _ in members[at : at + 2]}
        members.insert(at + 1, (f"{key}.{'png' if 'png' not in taken else 'jpg'}", encoded_image(1)[0]))
    write_tar(path, members, tarfile.PAX_FORMAT)


def joined(rng: np.random.Generator, folder: Path) -> None:
    """Two tars in one file, as `cat` joins them, or compressed, or with something behind their end."""
    path = some_tar(rng, folder)
    data, turn = path.read_bytes(), int(rng.integers(3))
    behind = (folder / "second.tar").read_bytes() if turn == 0 else rng.bytes(int(rng.integers(1, 3000)))
    rewrite(path, gzip.compress(data, mtime=0) if turn == 2 else data + behind)


def harm_index(rng: np.random.Generator, folder: Path) -> None:
    """For a folder that was indexed: an index flipped, cut, lost, or another tar's; the manifest there or lost too."""
    path = some_tar(rng, folder).with_suffix(".index.safetensors")
    other = folder / ("first" if path.name.startswith("second") else "second")
    data, turn = path.read_bytes(), int(rng.integers(6))
    if turn in (0, 4, 5):
        rewrite(path, flipped(rng, data))
    elif turn == 1:
        rewrite(path, data[: int(rng.integers(len(data)))])
    elif turn == 2:
        rewrite(path, other.with_suffix(".index.safetensors").read_bytes())
    else:
        path.unlink()
    if rng.integers(2):
        (folder / "manifest.json").unlink()


# The kinds of damage, in the order of the table.
FOREIGN: tuple[tuple[str, Damage], ...] = (
    ("tar cut inside data", cut_in_data),
    ("tar cut on a member boundary", cut_on_boundary),
    ("tar cut inside a header", cut_in_header),
    ("tar cut in its last zeros", cut_in_tail),
    ("header zeroed", zero_header),
    ("header garbage", garbage_header),
    ("bit flipped in a header", flip_header),
    ("duplicate keys", same_key),
    ("sample torn apart", torn_apart),
    ("members swapped", swap_members),
    ("samples with no or two images", wrong_images),
    ("tars joined, compressed, or followed by more", joined),
)
