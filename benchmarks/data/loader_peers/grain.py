"""grain over ArrayRecord files, with our decode as its transformation and a process of workers."""

import struct
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from benchmarks.data.loader_peers.equal_work import Cut
from benchmarks.data.loader_peers.given import BATCH, PREFETCH, SEED, Given, LoaderPath, Shown

HEAD = struct.Struct("<q")  # an image's number, before its bytes
PER_FILE = 200


class Decode(grain.transforms.Map):
    """A record to its pixels."""

    def __init__(self, given: Given):
        self.cut = Cut(given)

    def map(self, record: bytes) -> dict:
        number = HEAD.unpack_from(record)[0]
        return {"pixels": self.cut.image(number, record[HEAD.size :]).numpy(), "number": np.int64(number)}


def open_path(given: Given, variant: str) -> LoaderPath:
    def make(folder: Path) -> None:
        for first in range(0, len(given), PER_FILE):
            writer = ArrayRecordWriter(str(folder / f"{first:06d}.array_record"), "group_size:1")
            for number in range(first, min(first + PER_FILE, len(given))):
                writer.write(HEAD.pack(number) + given.data(number))
            writer.close()

    files = sorted(map(str, given.copy("grain", make).iterdir()))
    images = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(files)).shuffle(SEED).repeat()
    # in the worker's own thread: our decoder is one of a process, and a core has no use for more threads
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    batches = images.map(Decode(given)).to_iter_dataset(reading).batch(BATCH, drop_remainder=True)
    options = grain.multiprocessing.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=PREFETCH)
    return LoaderPath(iter(batches.mp_prefetch(options)), shown)


def shown(batch: dict[str, np.ndarray]) -> Shown:
    return batch["pixels"], batch["number"]
