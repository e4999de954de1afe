"""What the metadata of an index tell of its tar, beside the rows: which are bad, under what key, and why."""

import json
from dataclasses import dataclass

import numpy as np

from beitforge.shards.errors import Damaged
from beitforge.shards.format.index import FLAG_BAD, Index
from beitforge.shards.storage.reading import parse_json

_NAME = "bad"
_MOST = 1 << 20  # characters that the reasons of one index take; the rows beyond keep their mark
_LONGEST = 300  # characters of one
_UNKNOWN = "does not decode"


@dataclass(frozen=True)
class BadRow:
    """A row of an index whose image does not decode: its sample's key, and the reason."""

    row: int
    key: str
    reason: str


def bad_metadata(found: list[BadRow]) -> dict[str, str]:
    """The bad rows for the metadata of their index, as many as it has room for."""
    told, left = [], _MOST
    for bad in found:
        left -= len(bad.key) + len(bad.reason[:_LONGEST]) + 64
        if left < 0:
            break
        told.append({"row": bad.row, "key": bad.key, "reason": bad.reason[:_LONGEST]})
    return {_NAME: json.dumps(told)}


def bad_rows(index: Index) -> list[BadRow]:
    """Every row of an index that is marked bad. One whose reason is not told, as in the indexes of earlier versions,
    says only that it does not decode. Raises Damaged for metadata that no index has."""
    rows = np.flatnonzero(index.flags & FLAG_BAD).tolist()
    reasons = {said["row"]: said["reason"] for said in told(index, _NAME, row=int, reason=str)} if rows else {}
    return [BadRow(row, index.key(row), reasons.get(row, _UNKNOWN)) for row in rows]


def told(index: Index, name: str, **fields: type) -> list[dict]:
    """A list in the metadata of an index, of objects that have `fields` of these types; empty where there is none."""
    wrong = Damaged(f"{index.path}: what it says of {name!r} is damaged: make it again with `index --again`")
    try:
        rows = parse_json(index.metadata.get(name, "[]").encode("utf-8", "surrogatepass"))
    except Damaged as error:
        raise wrong from error
    if not isinstance(rows, list):
        raise wrong
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(field), kind) for field, kind in fields.items()):
            raise wrong
    return rows
