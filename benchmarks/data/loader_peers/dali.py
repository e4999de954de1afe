"""DALI's webdataset reader, region decoder and resize, all on the CPU: linear, or cubic with antialias."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from benchmarks.data.loader_peers.given import BATCH, BUFFER, SEED, SIZE, Given, LoaderPath, Shown

PER_FILE = 200
RESIZES = {
    "linear": {"interp_type": types.INTERP_LINEAR, "antialias": False},
    "cubic": {"interp_type": types.INTERP_CUBIC, "antialias": True},
}


def write_tar(path: Path, given: Given, numbers: range) -> None:
    """Images, each with its view: number, x, y, width, height, flip."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in numbers:
            view = np.array([number, *given.boxes[number], given.flips[number]], np.int32)
            for end, data in (("jpg", given.data(number)), ("view", view.tobytes())):
                member = tarfile.TarInfo(f"{number:06d}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, seed=SEED)
def pipeline(tars: list[str], resize: dict) -> tuple:
    """Pixels u8 [3, SIZE, SIZE] and number."""
    data, view = fn.readers.webdataset(
        paths=tars, ext=["jpg", "view"], random_shuffle=True, initial_fill=BUFFER, missing_component_behavior="error"
    )
    view = fn.reinterpret(view, dtype=types.INT32)
    crop = fn.decoders.image_slice(
        data, view[1:3], view[3:5], axis_names="WH", normalized_anchor=False, normalized_shape=False
    )
    resized = fn.resize(crop, size=[SIZE, SIZE], **resize)
    flipped = fn.flip(resized, horizontal=view[5], vertical=0)
    return fn.transpose(flipped, perm=[2, 0, 1]), view[0]


def open_path(given: Given, variant: str) -> LoaderPath:
    """linear or cubic."""

    def make(folder: Path) -> None:
        for first in range(0, len(given), PER_FILE):
            write_tar(folder / f"{first:06d}.tar", given, range(first, min(first + PER_FILE, len(given))))

    made = pipeline(sorted(map(str, given.copy("dali", make).iterdir())), RESIZES[variant])
    made.build()
    return LoaderPath(batches(made), shown)


def batches(made) -> Iterator:
    while True:
        yield made.run()


def shown(batch) -> Shown:
    return batch[0].as_array(), batch[1].as_array().reshape(-1)
