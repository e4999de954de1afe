"""The demo's images: photographs that ship inside scikit-image and scikit-learn, cut into tiles.

The photograph is the class. Training tiles come from the left of every photograph, test tiles from the right, and no
tile reaches across, so nothing of a test tile was ever seen. Must not know torch or any stage.
"""

import importlib.util
from pathlib import Path

import numpy as np

from beitforge.pipeline.errors import ConfigError
from beitforge.shards import counter_rng
from beitforge.shards.decode import codec

_SKIMAGE = (
    "astronaut",
    "brick",
    "camera",
    "cell",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "ihc",
    "moon",
    "motorcycle_left",
    "page",
    "rocket",
    "text",
)
_TRAIN_SHARE = 0.7  # of a photograph's width
_SIDES = (56, 128)  # shortest and longest side of a tile, pixels


def find_photographs() -> list[Path]:
    """The photographs found in the two packages, by name."""
    found = []
    for package, folder in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"the demo's photographs ship inside {package}, which is not installed: pip install '.[demo]', or give "
                f"a folder of your own images"
            )
        found.append(Path(spec.submodule_search_locations[0]) / folder)
    skimage, sklearn = found
    names = [skimage / f"{name}.png" for name in _SKIMAGE]
    names += [skimage / "hubble_deep_field.jpg", skimage / "retina.jpg", sklearn / "china.jpg", sklearn / "flower.jpg"]
    return sorted((path for path in names if path.exists()), key=lambda path: path.stem)


def write_tiles(folder: Path, train_tiles: int, test_tiles: int, seed: int) -> int:
    """Write `train_tiles` and `test_tiles` of each photograph to folder/train/CLASS and folder/test/CLASS as JPEG.

    Tiles overlap, and vary in size and aspect. Returns the number of photographs.
    """
    photos = find_photographs()
    for number, path in enumerate(photos):
        pixels = codec.decode(path.read_bytes())
        border = int(pixels.shape[1] * _TRAIN_SHARE)
        for split, part, count in (
            ("train", pixels[:, :border], train_tiles),
            ("test", pixels[:, border:], test_tiles),
        ):
            out = folder / split / path.stem
            out.mkdir(parents=True, exist_ok=True)
            for tile in range(count):
                cut = _tile(part, counter_rng.uniform(seed, number, split == "test", tile, np.arange(4)))
                (out / f"{path.stem}-{tile:04d}.jpg").write_bytes(codec.encode(cut, "jpg", 92))
    return len(photos)


def _tile(part: np.ndarray, u: np.ndarray) -> np.ndarray:
    """One tile u8 [h, w, 3] of a part of a photograph, by four numbers in [0, 1)."""
    low, high = _SIDES
    height = min(part.shape[0], int(low + (high - low) * u[0]))
    width = min(part.shape[1], int(low + (high - low) * u[1]))
    top, left = int(u[2] * (part.shape[0] - height + 1)), int(u[3] * (part.shape[1] - width + 1))
    return part[top : top + height, left : left + width]
