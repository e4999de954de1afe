"""What does decoding on a GPU give, and how far are its pixels from Pillow's?

    python -m benchmarks.gpu.decode          # on a GPU
    python -m benchmarks.gpu.decode --dry    # on a CPU, where the same steps run by libjpeg-turbo

Batches of JPEGs like ImageNet's in size, cut to random boxes and resized, as `loader.decoder: gpu` does it: the host
hands bytes over, and gets a batch of pixels on the device. Beside it one core of the host, as a worker does it.
"""

import functools
import io
import sys
import time

import numpy as np
import torch
from PIL import Image

from beitforge.shards.decode import codec
from beitforge.shards.format.index import FLAG_JPEG
from beitforge.shards.stream.loader import TORCH, Batch, Deferred, Stream, cut_into
from beitforge.shards.stream.on_device import OnDevice
from benchmarks.harness import Bench, Job, Row, measured, options

QUESTION = "decoding, cropping and resizing JPEGs of 500 × 375"
NOTE = (
    "Batches of {batch} crops of 8 to 100 % of 1/f noise at quality 90, 4:2:0, resized to 224 px. Host ms: of the "
    "host's cores, a batch. PSNR: of the crops before they are resized, against Pillow's pixels; from there on every "
    "bit is the same. Levels: the largest difference."
)
WIDTH, HEIGHT, SIZE, BATCH, BATCH_DRY, ROUNDS = 500, 375, 224, 64, 4, 10
_FINDS = ("images/s", "host ms", "PSNR dB", "levels")


@functools.lru_cache(maxsize=1)
def deferred(count: int) -> tuple[Deferred, ...]:
    """JPEGs and boxes, the same ones every time."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = np.inf
    found = []
    for row in range(count):
        planes = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(HEIGHT, WIDTH))) / frequency, (HEIGHT, WIDTH))]
        planes += [planes[0] + 0.3 * np.roll(planes[0], (7 * i, 11 * i), (0, 1)) for i in (1, 2)]
        pixels = 128 + 45 * np.stack([plane / plane.std() for plane in planes], axis=2)
        file = io.BytesIO()
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(file, "JPEG", quality=90, subsampling=2)
        share = np.sqrt(rng.uniform(0.08, 1.0))
        width, height = int(share * WIDTH), int(share * HEIGHT)
        box = [int(rng.integers(WIDTH - width + 1)), int(rng.integers(HEIGHT - height + 1)), width, height]
        found.append(Deferred(row, file.getvalue(), box, bool(row % 2), [0, 255]))
    return tuple(found)


def on_device(bench: Bench) -> Row:
    """`loader.decoder: gpu`; in a rehearsal the same on the processor."""
    count = BATCH if bench.timing == "events" else BATCH_DRY
    stream = Stream(images=None, places=None, source=None, size=(SIZE, SIZE))  # type: ignore[arg-type]
    device = OnDevice(stream, bench.device)
    given = deferred(count)
    empty = torch.empty(0)
    pixels = torch.empty((count, 3, SIZE, SIZE), dtype=torch.uint8, device=bench.device)
    batch = Batch(empty, pixels, empty, empty, empty, empty, empty, empty, {}, [], given)
    exact = [codec.crop(codec.decode(one.data), one.box).astype(np.int64) for one in given]
    apart = [
        crop.cpu().numpy() - right for crop, right in zip(device.crops(given), exact, strict=True) if crop is not None
    ]
    error = np.mean([np.mean(one.astype(float) ** 2) for one in apart])
    cells = {"PSNR dB": f"{10 * np.log10(255**2 / error):.1f}" if error else "the same pixels"}
    cells["levels"] = str(max(int(abs(one).max()) for one in apart))
    return {**_timed(lambda: device.finish(batch), count, bench), **cells}


def on_one_core(bench: Bench) -> Row:
    """A worker's way."""
    count = BATCH if bench.timing == "events" else BATCH_DRY
    out = torch.empty((3, SIZE, SIZE), dtype=torch.uint8)

    def run() -> None:
        for one in deferred(count):
            crop = codec.decode_view(one.data, one.box, (WIDTH, HEIGHT), FLAG_JPEG)
            cut_into(out, crop, one.flip, one.limits, TORCH)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {**_timed(run, count, bench), "PSNR dB": "the same pixels", "levels": "0"}
    finally:
        torch.set_num_threads(threads)


def _timed(run, count: int, bench: Bench) -> Row:
    """Rates over ROUNDS batches behind one that warms up."""
    run()
    if bench.timing == "none":
        return {"images/s": "not timed", "host ms": "not timed"}
    _wait(bench)
    began, used = time.perf_counter(), time.process_time()
    for _ in range(ROUNDS):
        run()
    _wait(bench)
    seconds, host = time.perf_counter() - began, time.process_time() - used
    rate = ROUNDS * count / seconds
    return {"images/s": f"{rate:,.0f}", "host ms": f"{1e3 * host / ROUNDS:.1f}", "_rate": rate}


def _wait(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


def jobs() -> list[Job]:
    """The GPU, then a core."""
    kinds = [("nvJPEG, resized on the GPU", on_device), ("one core of the host", on_one_core)]
    return [Job({"decoded by": name}, _FINDS, 2.5, run) for name, run in kinds]


def ratios(rows: list[Row]) -> dict[str, float]:
    """How many cores the GPU stands for."""
    rates = [float(row["_rate"]) for row in rows if "_rate" in row]  # type: ignore[arg-type]
    return {"the GPU / one core": rates[0] / rates[1]} if len(rates) == 2 else {}


def note(bench: Bench) -> str:
    return NOTE.format(batch=BATCH if bench.timing == "events" else BATCH_DRY)


def main() -> None:
    """The table."""
    asked = options("decode", ("imagenet",), sys.argv[1:])
    list(measured("decode", QUESTION, jobs(), asked, ratios, note(asked.bench)))


if __name__ == "__main__":
    main()
