"""Images in, image shard set out. A shard is finished when its index exists; the set when its manifest does."""

import contextlib
import json
import logging
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from beitforge.shards.errors import Damaged, ShardError
from beitforge.shards.format.equal_images import contents, told
from beitforge.shards.format.index import SUFFIX, open_index
from beitforge.shards.format.manifest import (
    NAME,
    PACKING,
    ImageManifest,
    read_image_manifest,
    refuse_other_manifest,
    write_manifest,
)
from beitforge.shards.pack.plan import FIRST_FORMAT, PackOptions, Plan, flat, make_plan
from beitforge.shards.pack.shard import PackedShard, TooManyRejected, check_rejected, finished_shard, pack_shard
from beitforge.shards.progress import Progress
from beitforge.shards.storage.files import sweep_partials, write_text
from beitforge.shards.storage.reading import parse_json, read_whole
from beitforge.shards.storage.staging import leftovers
from beitforge.shards.wording import counted
from beitforge.shards.workers import each_shard

MARKER = PACKING
REJECTED = "rejected.jsonl"

_LEAST_LIMIT = 10
_SHOWN_SETS = 5
_MOST_JSON = 1 << 26  # bytes
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packed:
    """A finished packing: a manifest per folder below the target ("": the target itself), and what was left out.

    `kept` counts the shards that an earlier run had finished, `shards` all of them. `conversions` counts by kind what
    the others were converted by. `emptied` are the classes none of
    whose images can be used. `equal` says which images repeat the bytes of others, a line each.
    """

    plan: Plan
    manifests: dict[str, ImageManifest]
    rejected: list[dict]
    kept: int
    shards: int
    conversions: dict[str, int]
    emptied: list[str]
    equal: list[str]


def pack(images: Path, target: Path, options: PackOptions, max_rejected: str, num_workers: int) -> Packed:
    """Pack the images below `images` into the shard set `target` (with splits: one set per split below it).

    max_rejected: how many images may be unusable, a count ("25") or a share ("1%", but never fewer than 10).
    Goes on where an earlier run of the same options and images was killed. Raises ShardError when `target` holds
    something else, when too many images are unusable, and for what `make_plan` forbids.
    """
    plan = _as_begun(make_plan(images, target, options))
    limit = rejection_limit(max_rejected, len(plan.files))
    _refuse_others(plan)
    finished = [shard for place, _ in plan.places() if (shard := finished_shard(place))]
    kept = len(finished)
    rejected = [row for shard in finished for row in shard.rejected]
    if kept == plan.num_shards and (manifests := _closed(plan)):
        return _packed(plan, manifests, finished, kept)
    _begin(plan)
    try:
        check_rejected(rejected, limit)
        _run(plan, limit, num_workers, finished)
    except TooManyRejected as error:
        known = [row for shard in finished for row in shard.rejected] + error.rejected
        _write_rejected(plan, list({row["path"]: row for row in known}.values()))
        raise
    return _close(plan, finished, kept)


def _as_begun(plan: Plan) -> Plan:
    """The plan, or that of format 1 where an earlier version began the packing by it: then it ends by it, too."""
    makers = _makers(plan.target, _folders(plan))
    if not makers or any("format" in one or one.get("plan") == plan.fingerprint for one in makers):
        return plan
    with contextlib.suppress(ShardError):  # this plan's refusal says more
        older = make_plan(plan.images, plan.target, plan.options, FIRST_FORMAT)
        if all(one.get("plan") == older.fingerprint for one in makers):
            return older
    return plan


def _packed(plan: Plan, manifests: dict[str, ImageManifest], finished: list[PackedShard], kept: int) -> Packed:
    """What is told of a finished packing."""
    rejected = [row for shard in finished for row in shard.rejected]
    lost = Counter(row["path"].split("/", 1)[0] for row in rejected)
    listed = np.bincount(plan.labels, minlength=len(plan.classes))
    emptied = [name for number, name in enumerate(plan.classes) if lost[name] == listed[number]]
    sets = {split or plan.target.name: contents(plan.folder(split), manifests[split]) for split in plan.orders}
    counts = kept, len(finished)
    return Packed(plan, manifests, _by_path(rejected), *counts, _conversions(finished), emptied, told(sets))


def rejection_limit(text: str, num_images: int) -> int:
    """The count that "25" or "1%" of the images stand for. Raises ShardError when the text is neither."""
    try:
        if text.endswith("%"):
            share = float(text[:-1])
            limit = max(_LEAST_LIMIT, int(num_images * share / 100))
        else:
            share = limit = int(text)
        if share >= 0:
            return limit
    except (ValueError, OverflowError):
        pass
    raise ShardError(f"--max-rejected is {text!r}, it must be a count such as 25 or a share such as 1%")


def _run(plan: Plan, limit: int, num_workers: int, finished: list[PackedShard]) -> None:
    """Pack the shards that are not in `finished`, adding them to it."""
    known = {(shard.folder, shard.entry.name) for shard in finished}
    jobs = plan.jobs(limit, known)
    done = sum(shard.entry.samples + len(shard.rejected) for shard in finished)
    rejected = [row for shard in finished for row in shard.rejected]
    if done == len(plan.files):
        return
    with (
        Progress("pack", len(plan.files), "images", done=done) as progress,
        contextlib.closing(
            each_shard(pack_shard, jobs, min(num_workers, plan.num_shards - len(known)), progress)
        ) as shards,
    ):
        for shard in shards:
            finished.append(shard)
            rejected += shard.rejected
            check_rejected(rejected, limit)


def _folders(plan: Plan) -> list[Path]:
    return list(dict.fromkeys([plan.target, *(plan.folder(split) for split in plan.orders)]))


def _refuse_others(plan: Plan) -> None:
    """Raises ShardError when the target holds what this plan did not make."""
    folders = _folders(plan)
    makers = _makers(plan.target, folders)
    below = sorted(path.parent for path in plan.target.glob(f"*/{NAME}") if path.parent not in folders)
    if below and not makers:
        names = ", ".join(path.name for path in below[:_SHOWN_SETS]) + (", …" if len(below) > _SHOWN_SETS else "")
        raise ShardError(
            f"{plan.target} holds finished sets already ({names}): give a new folder, such as {plan.target / 'more'}, "
            "or the --split they were made with"
        )
    for made_by in makers:
        if made_by.get("plan") != plan.fingerprint:
            raise ShardError(f"{plan.target} holds shards of another packing: {_difference(plan, made_by)}")
    for folder in folders:
        refuse_other_manifest(folder)
        lists = [folder / REJECTED] if (folder / REJECTED).exists() else []
        strangers = [] if makers else sorted([*folder.glob("*.tar"), *folder.glob(f"*{SUFFIX}"), *lists])
        if strangers:
            raise ShardError(
                f"{folder} holds {strangers[0].name} but nothing says which packing made it: choose another folder, "
                "or adopt the tars with `index`"
            )


def _makers(target: Path, folders: list[Path]) -> list[dict]:
    """What the folders say of how they were made: the marker, else their manifests, else their indexes."""
    marker = _read_json(target / MARKER)
    if marker:
        return [marker]
    manifests = [content for folder in folders if (content := _read_json(folder / NAME))]
    if manifests:
        return [made_by if isinstance(made_by := manifest.get("made_by"), dict) else {} for manifest in manifests]
    indexes = [path for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}"))[:1]]
    return [{"plan": plan} for path in indexes if (plan := open_index(path).metadata.get("plan"))]


def _closed(plan: Plan) -> dict[str, ImageManifest]:
    """The manifests of a finished set; {} where one is missing or not as it was written."""
    folders = {split: plan.folder(split) for split in plan.orders}
    if (plan.target / MARKER).exists() or not all(_read_json(folder / NAME) for folder in folders.values()):
        return {}
    try:
        return {split: read_image_manifest(folder) for split, folder in folders.items()}
    except ShardError as error:
        _log.warning("a manifest that was damaged, or changed by hand, is written again: %s", error)
        return {}


def _begin(plan: Plan) -> None:
    """Mark the set as unfinished, and sweep what a killed run left, which its marker or its shards prove."""
    swept = _makers(plan.target, _folders(plan))
    write_text(plan.target / MARKER, json.dumps(plan.describe(), indent=1) + "\n")
    for folder in _folders(plan):
        if swept:
            sweep_partials(leftovers(folder))


def _difference(plan: Plan, made_by: dict) -> str:
    """What differs between this plan and the one found, and the cure."""
    cure = "choose another folder, or delete this one to pack anew"
    theirs, ours = made_by.get("options"), json.loads(json.dumps(plan.describe()["options"]))
    if not isinstance(theirs, dict):
        return f"{'other options or images' if 'plan' in made_by else 'it was not made by `pack`'}; {cure}"
    flat_theirs, flat_ours = flat(theirs), flat(ours)
    differing = [
        f"{name} was {flat_theirs.get(name)}, is {value}"
        for name, value in flat_ours.items()
        if name != "picture" and flat_theirs.get(name, value) != value  # earlier versions lack some
    ]
    what = ", ".join(differing) or (
        f"the images differ (names, sizes, times or which are equal; {made_by.get('pictures')} then, "
        f"{len(plan.files)} now)"
    )
    return f"{what}; give the same options and images to go on with it, or {cure}"


def _read_json(path: Path) -> dict:
    """A JSON object, or {} where there is no whole one."""
    try:
        content = parse_json(read_whole(path, _MOST_JSON))
    except (FileNotFoundError, Damaged):
        return {}
    return content if isinstance(content, dict) else {}


def _conversions(finished: list[PackedShard]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for shard in finished:
        total.update(shard.conversions)
    return dict(sorted(total.items()))


def _by_path(rejected: list[dict]) -> list[dict]:
    return sorted(rejected, key=lambda row: row["path"])


def _write_rejected(plan: Plan, rejected: list[dict]) -> None:
    """The list of what was left out, no file when that is nothing: images that cannot be used, links to what is taken
    already, and a line for each kind of the files that are no images."""
    rows = _by_path(rejected)
    rows += [{"path": link, "reason": f"a link to {taken}, which is taken already"} for link, taken in plan.files.links]
    for kind, count, first in ((one.kind, one.files, one.first) for one in plan.files.others):
        reason = f"no image ({kind}): the first of {counted(count, 'file')}"
        rows.append({"path": first, "reason": reason, "kind": kind, "files": count})
    if rows:
        write_text(plan.target / REJECTED, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        (plan.target / REJECTED).unlink(missing_ok=True)


def _close(plan: Plan, finished: list[PackedShard], kept: int) -> Packed:
    """Write the list of rejected images, then the manifests; then the set is finished."""
    rejected = [row for shard in finished for row in shard.rejected]
    made_by = {**plan.describe(), "rejected": len(rejected), "conversions": _conversions(finished)}
    made_by["versions"] = {name: version(name) for name in ("webdataset", "pillow")}
    _write_rejected(plan, rejected)
    manifests = {}
    for split in plan.orders:
        mine = [shard.entry for shard in finished if shard.folder == plan.folder(split) and shard.entry.samples]
        if not mine:
            raise ShardError(
                f"none of the {len(plan.orders[split])} images for {plan.folder(split)} can be used: see "
                f"{plan.target / REJECTED} for the reasons"
            )
        shards = sorted(mine, key=lambda entry: entry.name)
        manifests[split] = ImageManifest(shards=shards, classes=plan.classes, made_by=made_by)
    for split, manifest in manifests.items():
        write_manifest(plan.folder(split), manifest)
    (plan.target / MARKER).unlink()
    return _packed(plan, manifests, finished, kept)
