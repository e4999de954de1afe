"""What transformers' image processors say of the pixels that weights take, and of how much of an image they see.

Must not know shards or any stage.
"""

import math
from typing import TYPE_CHECKING, Any

from beitforge.pipeline.weights.sources import Saved
from beitforge.pipeline.weights.stated import number, refuse, three

if TYPE_CHECKING:
    from beitforge.pipeline.weights.foreign import Foreign


def read_preprocessing(saved: Saved, found: "Foreign") -> None:
    """transformers multiplies by rescale_factor, then subtracts the mean and divides by the deviation; each may be
    switched off. Here values in [0, 1] are taken. Raises ConfigError for what is no preprocessing."""
    said = saved.preprocessor
    if not said:
        return
    factor = number(saved, said, "rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0
    _test_crop(said, found)
    normal = bool(said.get("do_normalize", True))
    mean, std = (said.get("image_mean"), said.get("image_std")) if normal else ([0.0] * 3, [1.0] * 3)
    if mean is None or std is None:
        return
    mean, std = three(saved, "image_mean", mean), three(saved, "image_std", std)
    scale = 255 * (factor or 0)
    if scale <= 0 or min(std) <= 0:
        refuse(saved, "rescale_factor and image_std of its image processor must be more than 0")
    exact = math.isclose(scale, 1, rel_tol=1e-6)
    found.mean, found.std = ([v if exact else v / scale for v in values] for values in (mean, std))


def _test_crop(said: dict, found: "Foreign") -> None:
    """finetune.test_crop, where its words say one."""
    size, crop = _side(said.get("size")), _side(said.get("crop_size"))
    if said.get("do_center_crop") and size and crop and crop <= size:
        found.test_crop = crop / size
    elif said.get("do_center_crop") is False:
        found.test_crop = 1.0
        squeezed = "squeezes whole images to squares" if said.get("do_resize", True) else "takes images as they are"
        found.notes.append(f"its own test {squeezed}; here the whole of the shorter side is seen: finetune.test_crop 1")


def _side(size: Any) -> float | None:
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int | float) and not isinstance(size, bool) and 0 < size < math.inf else None
