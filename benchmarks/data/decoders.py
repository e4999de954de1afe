"""What does each JPEG decoder cost, and how far are the approximate one's pixels from the others'?

Crops of the loader benchmark's images to their recorded views, decoded on one core in turn, round after round.
"""

import time

import numpy as np

from beitforge.shards.decode import codec, jpeg
from beitforge.shards.stream.image_set import ImageSet
from benchmarks.data.loader_corpus import corpus
from benchmarks.results import write

IMAGES, ROUNDS = 256, 7
Crop = tuple[bytes, list[int], tuple[int, int], int]


def main() -> None:
    """Microseconds of CPU a crop, in the median of the rounds."""
    collection = corpus(IMAGES)
    crops = recorded(ImageSet(collection.shards))
    names = ["auto", *jpeg.EXACT[1:], jpeg.APPROXIMATE]
    exact = [codec.crop(codec.decode(data), box).astype(np.int64) for data, box, _, _ in crops]
    spent: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            began = time.process_time()
            for data, box, size, flags in crops:
                codec.decode_view(data, box, size, flags, name)
            spent[name].append(1e6 * (time.process_time() - began) / len(crops))
    rows = [row(name, crops, exact, spent[name]) for name in names]
    ratios = {
        f"{other} / {jpeg.APPROXIMATE}": float(np.median(np.divide(spent[other], spent[jpeg.APPROXIMATE])))
        for other in ("auto", "simplejpeg")
    }
    note = (
        f"{collection.describe()} PSNR: over all pixels of a crop against Pillow's, its mean and least over the crops. "
    )
    note += "The approximate decoder has the fast DCT and plain upsampling; the resize behind it is the same for all."
    write("decoders", "what does a JPEG decoder cost, and give?", rows, ratios, [note])


def recorded(images: ImageSet) -> list[Crop]:
    """Every image with the box that a first view of it has, its size and its flags."""
    from beitforge.shards.format.views import ViewPolicy, draw_views

    found: list[Crop] = []
    for shard in range(len(images.manifest.shards)):
        index = images.index(shard)
        sizes = index.width, index.height
        boxes = draw_views(ViewPolicy(), index.key_hash, 0, *sizes, index.greys).boxes.tolist()
        for row_, (box, width, height, flags) in enumerate(
            zip(boxes, *(side.tolist() for side in sizes), index.flags.tolist(), strict=True)
        ):
            found.append((images.read(shard, row_), box, (width, height), flags))
    return found


def row(name: str, crops: list[Crop], exact: list[np.ndarray], spent: list[float]) -> dict:
    """Cost, and distance from Pillow's pixels; an exact decoder that has any is an error."""
    errors = np.array(
        [
            np.mean((codec.decode_view(data, box, size, flags, name) - right) ** 2)
            for (data, box, size, flags), right in zip(crops, exact, strict=True)
        ]
    )
    assert name == jpeg.APPROXIMATE or not errors.any(), f"{name} gives other pixels than Pillow"
    decibels = 10 * np.log10(255**2 / errors.clip(min=1e-9))
    distance = f"{decibels.mean():.1f} ({decibels.min():.1f})" if errors.any() else "the same pixels"
    return {
        "decoder": name,
        "by": jpeg.decoder(name).name,
        "CPU µs a crop": round(float(np.median(spent))),
        "least": round(min(spent)),
        "most": round(max(spent)),
        "PSNR dB": distance,
    }


if __name__ == "__main__":
    main()
