"""FFCV's file of JPEGs that it packs anew, its whole decode and area resize, at the given views."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import ResizedCropRGBImageDecoder, imdecode, resize_crop
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.compiler import Compiler
from ffcv.transforms import Squeeze, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from PIL import Image

from benchmarks.data.loader_peers.equal_work import shown
from benchmarks.data.loader_peers.given import BATCH, PREFETCH, SEED, SIZE, Given, LoaderPath

FILE = "images.beton"


class Images:
    """What its writer takes: (pixels, number)."""

    def __init__(self, given: Given):
        self.given = given

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.open(self.given.folder / "originals" / f"{number:06d}.jpg").convert("RGB"), number


class GivenCrop(ResizedCropRGBImageDecoder):
    """Its random resized crop, with boxes and flips that are given: its own would draw others."""

    def __init__(self, given: Given):
        super().__init__((SIZE, SIZE))
        self.boxes, self.flips = given.boxes, given.flips

    def get_crop_generator(self) -> None:
        """Nothing is drawn."""

    def generate_code(self) -> Callable:
        read, each = self.memory_read, Compiler.get_iterator()
        decode_jpeg, resize, boxes, flips = (
            Compiler.compile(imdecode),
            Compiler.compile(resize_crop),
            self.boxes,
            self.flips,
        )

        def decode(batch_indices, my_storage, metadata, storage_state):
            destination, temporary = my_storage
            for i in each(len(batch_indices)):
                number = batch_indices[i]
                known = metadata[number]
                data = read(known["data_ptr"], storage_state)
                height, width = np.uint32(known["height"]), np.uint32(known["width"])
                whole = temporary[i]
                decode_jpeg(data, whole, height, width, height, width, 0, 0, 1, 1, False, False)
                pixels = whole.reshape(-1)[: 3 * height * width].reshape(height, width, 3)
                x, y, w, h = boxes[number]
                resize(pixels, y, y + h, x, x + w, destination[i])
                if flips[number]:
                    destination[i] = destination[i][:, ::-1].copy()
            return destination[: len(batch_indices)]

        setattr(decode, "is_parallel", True)  # noqa: B010 - a function has no such attribute to a type checker
        return decode


def open_path(given: Given, variant: str) -> LoaderPath:
    def make(folder: Path) -> None:
        fields = {"image": RGBImageField(write_mode="jpg"), "number": IntField()}
        DatasetWriter(str(folder / FILE), fields, num_workers=1).from_indexed_dataset(Images(given))

    loader = Loader(
        str(given.copy("ffcv", make) / FILE),
        batch_size=BATCH,
        num_workers=1,
        order=OrderOption.RANDOM,
        seed=SEED,
        drop_last=True,
        batches_ahead=PREFETCH,
        pipelines={
            "image": [GivenCrop(given), ToTensor(), ToTorchImage()],
            "number": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )
    return LoaderPath(endless(loader), shown)


def endless(loader: Loader) -> Iterator:
    while True:
        yield from loader
