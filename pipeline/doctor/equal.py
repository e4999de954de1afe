"""What `doctor` says of images that sets have in common: a judgement by images that were trained on is none.

Must not know deepspeed, the model or any stage.
"""

import random
import time

import numpy as np

from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.data.pretraining import image_set
from beitforge.pipeline.doctor.findings import OK, WARNING, Local
from beitforge.pipeline.errors import ConfigError
from beitforge.shards.errors import ShardError
from beitforge.shards.format.equal_images import Contents, contents_of

_CURE = "pack both from one folder with `pack --split`, which keeps equal files on one side, or take these images out"


def equal_images(config: Config, seconds: float, local: Local) -> None:
    """Counts of equal images: within each set to learn from, and of those that judge in these. Sets that do not open
    are told elsewhere. Of large ones shards at random are looked at, for as long as there is time."""
    data = config.data
    learnt = {"data.images": data.images, "data.labelled_images": data.labelled_images}
    judged = {"data.heldout_images": data.heldout_images, "data.labelled_test": data.labelled_test}
    until = {where: 0.0 for where in (*judged.values(), *learnt.values()) if where}
    until = {where: (i + 1) / len(until) * seconds + time.monotonic() for i, where in enumerate(until)}
    found = {where: _contents(config, where, end, local) for where, end in until.items()}
    ours = {name: found[where] for name, where in learnt.items() if where and len(found[where].xxh3)}
    common = 0
    for judge, where in judged.items():
        for name in ours if where else ():
            if both := found[where].within(ours[name]):
                common += 1
                what = f"{both} of {len(found[where].xxh3)} images of {judge} are byte for byte in {name}, too"
                local.add(WARNING, "equal", what, _CURE, whole_host=True)
    if ours and not common:
        repeated = [f"{one.copies()} of {len(one.xxh3)} images of {name}" for name, one in ours.items()]
        local.add(OK, "equal", f"repeat the bytes of another: {', '.join(repeated)}", whole_host=True)


def _contents(config: Config, where: str, until: float, local: Local) -> Contents:
    """Of a set's shards, in random order, as far as time allows."""
    found = []
    try:
        images = image_set(config, where)
        numbers = list(range(len(images.manifest.shards)))
        random.Random(local.host).shuffle(numbers)
        for number in numbers:
            index = images.index(number)
            found.append((index.image_xxh3, index.label, index.flags))
            if time.monotonic() > until:
                break
    except (ShardError, ConfigError):
        pass  # the checks of this set have its error
    if not found:
        return Contents(np.zeros(0, np.uint64), np.zeros(0, np.int64))
    return contents_of(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
