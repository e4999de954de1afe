"""What the sets say themselves of images that cannot be used, before the first of them is read.

Must not know model, deepspeed or any stage.
"""

import numpy as np

from beitforge.pipeline.config.derived import allowed_bad
from beitforge.pipeline.data.pretraining import DataSource
from beitforge.pipeline.errors import ConfigError
from beitforge.shards.format.index import FLAG_BAD
from beitforge.shards.format.manifest import known_bad, unreadable
from beitforge.shards.storage.remote import Remote
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import BadSample
from beitforge.shards.stream.view_sources import RecordedViews


def known_lines(source: DataSource) -> list[str]:
    """A line for the images of a source that do not decode, and one for those that have no tokens, where there are any.
    Raises ShardError."""
    lines, views = [], source.stream.source
    if found := number_of_bad(source.stream.images):
        lines.append(known_line(source.stream.images, found))
    if isinstance(views, RecordedViews) and (found := unreadable(views.tokens.manifest) or 0):
        lines.append(f"{views.tokens.folder}: {found} more could not be tokenized; others stand in for them")
    return lines


def known_line(images: ImageSet, found: int) -> str:
    """That `found` images of a set are known to be bad, in words."""
    return (
        f"{images.folder}: {found} of {len(images)} images ({found / len(images):.2%}) do not decode, known "
        f"since it was indexed; others stand in for them, and no budget is charged"
    )


def refuse_over_budget(bad: list[BadSample], source: DataSource, share: float) -> list[str]:
    """A line for each image that was replaced though nothing was known against it. Raises ConfigError where these are
    more than the share (data.bad_sample_budget) of the source."""
    found = {(one.shard, one.key): one.reason for one in bad if not one.known}
    if len(found) > (limit := allowed_bad(source.samples, share)):
        (shard, key), reason = next(iter(found.items()))
        raise ConfigError(
            f"{len(found)} images of {source.stream.images.folder} that were not known to be bad could not be used, "
            f"more than the {limit} of data.bad_sample_budget (first {shard} {key}: {reason}): repair the shards ("
            "`verify --decode` finds them)"
        )
    return [f"{shard} {key}: left out ({reason})" for (shard, key), reason in found.items()]


def number_of_bad(images: ImageSet) -> int:
    """How many images of a set are known not to decode: its manifest says it; of a set of an earlier version, its
    indexes, as far as they lie on this machine."""
    found = known_bad(images.manifest)
    if found is not None:
        return found
    if isinstance(images.folder, Remote):
        return 0
    shards = range(len(images.manifest.shards))
    return sum(int(np.count_nonzero(images.index(shard).flags & FLAG_BAD)) for shard in shards)
