"""Is our view BEiT's? Cut by the record, jittered afterwards, against Pillow's jitter of the whole image first."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance

from beitforge.pipeline.data.demo_images import find_photographs
from beitforge.pipeline.model.pixels import jitter
from beitforge.shards import counter_rng
from beitforge.shards.decode import codec
from beitforge.shards.format.levels import Greys, levels_of_means
from beitforge.shards.format.views import JITTER_ORDERS, ViewPolicy, draw_views
from beitforge.shards.stream.loader import TORCH, TORCH_LANCZOS, cut_into
from benchmarks.results import write

DRAWS = 16  # of each photograph
ENCODER, TOKENIZER = (224, TORCH, Image.Resampling.BICUBIC), (112, "lanczos", Image.Resampling.LANCZOS)
SIZES = {"encoder 224": ENCODER, "tokenizer 112": TOKENIZER}
SIZES["tokenizer 112 by torch lanczos"] = (112, TORCH_LANCZOS, Image.Resampling.LANCZOS)
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)  # in the order of a record's factors


@dataclass(frozen=True)
class Draw:
    """One view of a photograph: pixels u8 [H, W, 3]; box x, y, width, height; factors f32 [3]; levels u8 [3], and those
    of the second arithmetic (shards.format.levels)."""

    name: str
    pixels: np.ndarray
    box: list[int]
    flip: bool
    factors: np.ndarray
    order: int
    levels: np.ndarray
    levels_before: np.ndarray


def draw_photographs(count: int, names: tuple[str, ...] = ()) -> Iterator[Draw]:
    """`count` views of each photograph (of `names`, or of all) under the default policy."""
    for path in find_photographs():
        if names and path.stem not in names:
            continue
        pixels = codec.decode(path.read_bytes())
        keys = np.full(count, counter_rng.hash_key(path.stem), np.uint64)
        width, height = (np.full(count, side) for side in (pixels.shape[1], pixels.shape[0]))
        mean, tones = codec.greys(pixels)
        greys = Greys(np.full(count, mean, np.float32), np.tile(np.array(tones, np.uint16), (count, 1)))
        views = draw_views(ViewPolicy(), keys, np.arange(count), width, height, greys)
        operations = JITTER_ORDERS[views.orders]
        before = levels_of_means(np.take_along_axis(views.jitters, operations, axis=-1), operations, greys.means)
        for i in range(count):
            box, flip, order = views.boxes[i].tolist(), bool(views.flips[i]), int(views.orders[i])
            yield Draw(path.stem, pixels, box, flip, views.jitters[i], order, views.levels[i], before[i])


def official_jitter(draw: Draw) -> np.ndarray:
    """torchvision's ColorJitter of the whole Pillow image, u8 [H, W, 3]."""
    image = Image.fromarray(draw.pixels)
    for operation in JITTER_ORDERS[draw.order]:
        image = _ENHANCERS[operation](image).enhance(float(draw.factors[operation]))
    return np.array(image)


def official_cut(pixels: np.ndarray, draw: Draw, size: int, resample: Image.Resampling) -> np.ndarray:
    """torchvision's flip of the whole image, then resized_crop of the box, mirrored with it; u8 [size, size, 3]."""
    image = Image.fromarray(pixels)
    x, y, width, height = draw.box
    if draw.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = image.width - x - width
    return np.array(image.crop((x, y, x + width, y + height)).resize((size, size), resample))


def our_cut(pixels: np.ndarray, draw: Draw, size: int, resample: str, levels: np.ndarray | None = None) -> np.ndarray:
    """The loader's cut, u8 [size, size, 3], clamped to the draw's levels or to others."""
    out = torch.empty((3, size, size), dtype=torch.uint8)
    limits = (draw.levels if levels is None else levels)[:2].tolist()
    cut_into(out, codec.crop(pixels, draw.box), draw.flip, limits, resample)
    return out.permute(1, 2, 0).numpy()


def our_jitter(pixels: np.ndarray, draw: Draw, levels: np.ndarray | None = None) -> np.ndarray:
    """pipeline.model.pixels.jitter of one image u8 [H, W, 3], by the draw's levels or others; f32 [H, W, 3], 0-255."""
    batch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    factors, order = torch.from_numpy(draw.factors)[None], torch.tensor([draw.order])
    pivot = torch.tensor([float((draw.levels if levels is None else levels)[2])])
    return jitter(batch, factors, order, pivot)[0].permute(1, 2, 0).numpy() * 255


def squared_errors(draw: Draw) -> dict[str, float]:
    """Mean squared error in levels² of every stage of one view."""
    whole = official_jitter(draw)
    errors = {"jitter alone, whole image": _error(our_jitter(draw.pixels, draw), whole)}
    for name, (size, ours, theirs) in SIZES.items():
        official, plain = (official_cut(pixels, draw, size, theirs) for pixels in (whole, draw.pixels))
        unclamped = our_cut(draw.pixels, draw, size, ours, np.array([0, 255]))
        before = our_cut(draw.pixels, draw, size, ours, draw.levels_before)
        errors[f"{name}: crop, flip, resize"] = _error(unclamped, plain)
        errors[f"{name}: full view"] = _error(our_jitter(our_cut(draw.pixels, draw, size, ours), draw), official)
        by_mean = our_jitter(before, draw, draw.levels_before)
        errors[f"{name}: full view, contrast about the mean × factor"] = _error(by_mean, official)
        errors[f"{name}: full view, not clamped before the resize"] = _error(our_jitter(unclamped, draw), official)
    return errors


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean((found.astype(np.float64) - expected) ** 2))


def decibels(squared_error: float) -> float:
    """PSNR of 8-bit pixels. Equal ones count as an error of one level in one value of a million: 108 dB."""
    return 10 * math.log10(255**2 / max(squared_error, 1e-6))


def check(draw: Draw) -> None:
    """The box lies in the image, and flipping before the crop takes the pixels that flipping after it takes."""
    x, y, width, height = draw.box
    assert x + width <= draw.pixels.shape[1] and y + height <= draw.pixels.shape[0], f"{draw.name}: box leaves"
    mirrored = draw.pixels[:, ::-1] if draw.flip else draw.pixels
    left = mirrored.shape[1] - x - width if draw.flip else x
    theirs, ours = mirrored[y : y + height, left : left + width], draw.pixels[y : y + height, x : x + width]
    assert np.array_equal(theirs, ours[:, ::-1] if draw.flip else ours), f"{draw.name}: other pixels are cut"


def main() -> None:
    """PSNR of every stage over all photographs, and what each cause costs."""
    for path in find_photographs():
        with Image.open(path) as image:
            assert np.array_equal(codec.decode(path.read_bytes()), np.array(image.convert("RGB"))), f"{path} decodes"
    columns = ("pooled dB", "mean dB", "5th percentile dB", "worst dB")
    rows: list[dict] = [{"stage": "decode", "squared error": 0.0, **dict.fromkeys(columns, "equal")}]
    measured = []
    for name in [path.stem for path in find_photographs()]:
        for draw in draw_photographs(DRAWS, (name,)):
            check(draw)
            measured.append(squared_errors(draw))
    for stage in measured[0]:
        errors = [view[stage] for view in measured]
        each = np.array([decibels(error) for error in errors])
        values = [decibels(float(np.mean(errors))), each.mean(), np.percentile(each, 5), each.min()]
        rows.append({"stage": stage, "squared error": float(np.mean(errors))} | dict(zip(columns, values, strict=True)))
    views = [row["pooled dB"] for row in rows if row["stage"].endswith("full view")]
    assert len(views) == len(SIZES) and min(views) >= 45, f"the views are not BEiT's: {views} dB"
    note = f"{len(find_photographs())} photographs, {DRAWS} views each; squared errors in levels² of 255, mean over "
    note += "views, pooled dB from that mean. Official: Pillow's jitter of the whole image, then flip, crop, resize. "
    note += (
        "Ours: the crop is clamped to what the jitter does not clip, cut by the record, and jittered afterwards on the "
        "device. "
    )
    note += "What is left is a saturation that draws clipped colours back, and the rounding of the two orders."
    write("views", "is our view BEiT's?", rows, {}, [note])


if __name__ == "__main__":
    main()
