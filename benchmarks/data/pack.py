"""What packing costs: to list a million files, to pack a photograph, and what it is worth stored smaller."""

import contextlib
import hashlib
import importlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import xxhash
from PIL import Image

from beitforge.shards.decode import codec
from beitforge.shards.format.index import FLAG_JPEG, index_path, write_index
from beitforge.shards.format.levels import tone_table
from beitforge.shards.pack.encode import EncodeOptions, read_file, shrunk_size
from beitforge.shards.pack.pack import pack
from beitforge.shards.pack.plan import PackOptions, ShardJob, make_plan
from beitforge.shards.pack.tar_scan import Facts, index_row, read_tar
from beitforge.shards.storage.reading import file_digest
from benchmarks.data.loader_corpus import FOLDER, write_images
from benchmarks.results import write

FILES, PER_FOLDER = 1_000_000, 1000
IMAGES, SHRUNK, ROUNDS, PER_SHARD = 200, 60, 5, 200
SHORT_SIDE, MTIME = 320, 1577836800
STORED = ((95, "444"), (95, "422"), (95, "420"), (90, "444"), (90, "420"), (85, "420"))
FACTS = "with what the index says"


def main() -> None:
    """Three tables."""
    listing(FOLDER / f"listing-{FILES}")
    originals = FOLDER / f"pack-{IMAGES}"
    if not originals.exists():
        shutil.rmtree(partial := originals.with_suffix(".partial"), ignore_errors=True)
        write_images(partial, IMAGES)
        partial.rename(originals)
    packing(originals)
    stored(originals)


def listing(folder: Path) -> None:
    """Seconds and bytes of a plan of FILES files, each in a process of its own, in turn with a bare scan."""
    if not folder.exists():
        make_files(folder)
    scans, plans, rows = [], [], []
    for _ in range(3):
        scans.append(in_process("scan", folder))
        plans.append(in_process("plan", folder))
    for name, found in (("os.scandir and stat of each, nothing kept", scans), ("`pack`'s whole plan", plans)):
        seconds, held, most = (statistics.median(one[i] for one in found) for i in range(3))
        rows.append({"of a million files": name, "CPU s": seconds, "own MB after": held, "own MB at most": most})
    ratio = statistics.median(one[0] for one in plans) / statistics.median(one[0] for one in scans)
    note = (
        f"{FILES:,} files of one byte in folders of {PER_FOLDER}, hard links, all in the page cache. The plan has "
        "their order, keys, hashes, sizes, times and classes, and the fingerprint by which an interrupted packing goes "
        "on. Memory is what is not shared with other processes, Python's and NumPy's own 22 MB included."
    )
    write("listing", "what does `pack` do before its first byte?", rows, {"plan / scan": ratio}, [note])


def make_files(folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for start in range(0, FILES, PER_FOLDER):
        within = partial / f"n{start // PER_FOLDER:08d}"
        within.mkdir(parents=True)
        first = within / f"{within.name}_0.JPEG"
        first.write_bytes(b"x")
        for i in range(1, min(PER_FOLDER, FILES - start)):
            os.link(first, within / f"{within.name}_{i * 37}.JPEG")
    partial.rename(folder)


def in_process(what: str, folder: Path) -> tuple[float, float, float]:
    """CPU seconds, memory of its own and the most of it, MB, of a process that does this (`pack_child`)."""
    command = [sys.executable, "-m", "benchmarks.data.pack_child", what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    files, classes, seconds, held, most = done.stdout.split()
    assert what != "plan" or (int(files), int(classes)) == (FILES, FILES // PER_FOLDER), "not what was made"
    return float(seconds), float(held), float(most)


def packing(originals: Path) -> None:
    """CPU time an image, ours beside the loops it replaces, in turn."""
    kept, shrunk = EncodeOptions(), EncodeOptions(short_side=SHORT_SIDE)
    some = originals.with_name(f"pack-{SHRUNK}-of-{IMAGES}")
    some.mkdir(exist_ok=True)
    for path in sorted(originals.iterdir())[:SHRUNK]:
        with contextlib.suppress(FileExistsError):
            os.link(path, some / path.name)
    rows, ratios = [], {}
    for task, folder, options in (("bytes kept", originals, kept), (f"short side {SHORT_SIDE}", some, shrunk)):
        times = measured(folder, options)
        for name, microseconds in times.items():
            beside = microseconds / times["ours"]
            rows.append({"images": task, "by": name, "CPU µs an image": microseconds, "of ours": beside})
            if name != "ours":
                ratios[f"{name} / ours, {task}"] = beside
    memory = [in_process(what, originals)[1] for what in ("nothing", "webdataset")]
    notes = [
        "`before` is `pack` as it was: Pillow for the pixels, simplejpeg for libjpeg's warnings, the greys from "
        "copies, webdataset's writer, the tar read again; its tars are compared with ours byte for byte.",
        "The loops like img2dataset decode each image, shrink it where asked, take its SHA-256 and size, and write it "
        f"by webdataset.ShardWriter; none asks libjpeg whether the image is whole. That {FACTS} takes mean grey and "
        "tones of what is stored as well, which makes the work equal. Pillow's shrinks as ours does (Lanczos, 4:4:4); "
        "OpenCV's is img2dataset's own (pixel area, 4:2:0), another and cheaper arithmetic.",
        f"A worker's own memory before its first image: {memory[0]:.0f} MB, and {memory[1]:.0f} MB with webdataset's "
        "writer, which imports torch where that is installed.",
    ]
    write("pack", "what does packing a photograph cost?", rows, ratios, notes)


def measured(folder: Path, options: EncodeOptions) -> dict[str, float]:
    """CPU µs an image by contender: medians of rounds in which each packs all images."""
    contenders: dict[str, Callable[[Path], None]] = {
        "ours": lambda out: _ours(folder, out, options),
        "before": lambda out: before(folder, out, options),
        "like img2dataset, Pillow": lambda out: like_img2dataset(folder, out, options, by_pillow),
        f"like img2dataset, Pillow, {FACTS}": lambda out: like_img2dataset(folder, out, options, by_pillow, True),
    }
    with contextlib.suppress(ImportError):
        importlib.import_module("cv2")
        contenders["like img2dataset, OpenCV"] = lambda out: like_img2dataset(folder, out, options, by_opencv)
    count, out = len(list(folder.iterdir())), FOLDER / "packed"
    times: dict[str, list[float]] = {name: [] for name in contenders}
    tars: dict[str, dict[str, str]] = {}
    for turn in range(ROUNDS + 1):  # the first warms up
        for name, run in contenders.items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            started = time.process_time()
            run(out)
            if turn:
                times[name].append((time.process_time() - started) / count * 1e6)
            tars[name] = {path.name: file_digest(path) for path in out.glob("*.tar")}
    shutil.rmtree(out)
    assert tars["ours"] == tars["before"], "the tars are not what they were"
    return {name: statistics.median(found) for name, found in times.items()}


def _options(options: EncodeOptions) -> PackOptions:
    return PackOptions(samples_per_shard=PER_SHARD, labels="none", encoding=options)


def _ours(folder: Path, out: Path, options: EncodeOptions) -> None:
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        pack(folder, out, _options(options), "0", 1)


def before(folder: Path, out: Path, options: EncodeOptions) -> None:
    """As `pack` did it until it decoded each image once."""
    for job in make_plan(folder, out, _options(options)).jobs(0):
        _shard_before(job)


def _shard_before(job: ShardJob) -> None:
    from webdataset.writer import TarWriter

    tar, facts = job.folder / f"{job.name}.tar", []
    with open(tar, "wb") as file, TarWriter(file, encoder=False, mtime=MTIME) as writer:
        for image in job.planned:
            data = read_file(job.images / image.path)
            pixels, header = _twice_decoded(data)
            height, width = pixels.shape[:2]
            small = shrunk_size(width, height, job.options)
            if small != (width, height):
                pixels = codec.resize(pixels, (small[1], small[0]), "lanczos")
                data = codec.encode(pixels, "jpg", job.options.quality)
                pixels, header = _twice_decoded(data)
            facts.append(_facts_before(data, header, pixels))
            about = {"source": image.path, "width": header.width, "height": header.height}
            writer.write({"__key__": image.key, "jpg": data, "json": json.dumps(about).encode()})
    rows = [index_row(sample, one, None) for sample, one in zip(read_tar(tar).samples, facts, strict=True)]
    write_index(index_path(job.folder, job.name), rows, {"tar_digest": file_digest(tar)})


def _twice_decoded(data: bytes) -> tuple[np.ndarray, codec.Header]:
    header = codec.read_header(data)
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(image.convert("RGB"))
    simplejpeg.decode_jpeg(data, "GRAY")
    return pixels, header


def _facts_before(data: bytes, header: codec.Header, pixels: np.ndarray) -> Facts:
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    mean = int(grey.sum(dtype=np.uint64)) / grey.size
    tones = tone_table(Image.fromarray(pixels).histogram())
    return Facts(xxhash.xxh3_64_intdigest(data), header.width, header.height, mean, header.flags, tones)


Shrink = Callable[[bytes, EncodeOptions], tuple[bytes, Image.Image | None, tuple[int, int]]]


def like_img2dataset(folder: Path, out: Path, options: EncodeOptions, shrink: Shrink, facts: bool = False) -> None:
    """A loop over files. facts: whether an index is made that says of each what ours does, of what is stored."""
    from webdataset import ShardWriter

    tones: list[tuple[float, tuple[int, ...]]] = []
    with ShardWriter(f"{out}/%06d.tar", maxcount=PER_SHARD, verbose=0) as writer:
        for path in sorted(folder.iterdir()):
            data, image, size = shrink(path.read_bytes(), options)
            if facts and image is not None:
                grey = np.asarray(image.convert("L"))
                tones.append((int(grey.sum(dtype=np.uint64)) / grey.size, tone_table(image.histogram())))
            elif facts:
                pixels = codec.decode(data)
                tones.append(codec.greys(pixels))
            about = {"key": path.stem, "size": size, "sha256": hashlib.sha256(data).hexdigest()}
            writer.write({"__key__": path.stem, "jpg": data, "json": json.dumps(about).encode()})


def by_pillow(data: bytes, options: EncodeOptions) -> tuple[bytes, Image.Image | None, tuple[int, int]]:
    """What is stored, its pixels if they are known, its size."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        size = shrunk_size(*image.size, options)
        if size != image.size:
            file = io.BytesIO()
            small = image.resize(size, Image.Resampling.LANCZOS)
            small.save(file, "JPEG", quality=options.quality, subsampling=0)
            return file.getvalue(), None, size
        return data, image, size


def by_opencv(data: bytes, options: EncodeOptions) -> tuple[bytes, None, tuple[int, int]]:
    """As `by_pillow`, by OpenCV."""
    cv2 = importlib.import_module("cv2")
    cv2.setNumThreads(1)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    height, width = image.shape[:2]
    size = shrunk_size(width, height, options)
    if size != (width, height):
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, options.quality])[1].tobytes()
    return data, None, size


def stored(originals: Path) -> None:
    """Bytes, loss and time to read a view of images that were shrunk and encoded anew."""
    pixels = []
    for path in sorted(originals.iterdir())[:SHRUNK]:
        whole = codec.decode(path.read_bytes())
        width, height = shrunk_size(whole.shape[1], whole.shape[0], EncodeOptions(short_side=SHORT_SIDE))
        pixels.append(codec.resize(whole, (height, width), "lanczos"))
    rng = np.random.default_rng(0)
    boxes = [_box(rng, one.shape[1], one.shape[0]) for one in pixels]
    files = {how: [codec.encode(one, "jpg", *how) for one in pixels] for how in STORED}
    times: dict[tuple[int, str], list[float]] = {how: [] for how in STORED}
    for _ in range(ROUNDS):
        for how, found in files.items():
            started = time.process_time()
            for data, one, box in zip(found, pixels, boxes, strict=True):
                codec.decode_view(data, box, (one.shape[1], one.shape[0]), FLAG_JPEG)
            times[how].append((time.process_time() - started) / SHRUNK * 1e6)
    first, rows = statistics.median(times[STORED[0]]), []
    for how, found in files.items():
        loss = np.mean([_psnr(codec.decode(data), one) for data, one in zip(found, pixels, strict=True)])
        row = {"--quality": how[0], "--subsampling": how[1], "kB": sum(map(len, found)) / SHRUNK / 1000}
        microseconds = statistics.median(times[how])
        rows.append({**row, "dB": f"{loss:.1f}", "CPU µs a view": microseconds, "as fast": first / microseconds})
    note = (
        f"{SHRUNK} of the photographs at --short-side {SHORT_SIDE}; dB against the pixels before they were encoded; a "
    )
    note += "view is a box of 20 to 100 % of the image, decoded as the stream does it."
    write("stored", "what is a photograph worth stored smaller?", rows, {}, [note])


def _box(rng: np.random.Generator, width: int, height: int) -> list[int]:
    area, aspect = rng.uniform(0.2, 1) * width * height, np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = min(width, int((area * aspect) ** 0.5)), min(height, int((area / aspect) ** 0.5))
    return [int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h]


def _psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    return 10 * float(np.log10(255**2 / np.mean((ours.astype(np.float64) - theirs) ** 2)))


if __name__ == "__main__":
    main()
