"""The sections of a live page, and which of them are new since a reader last asked.

Must not know runs, torch or any stage.
"""

import re
import secrets
from collections.abc import Sequence

from beitforge.pipeline.reports.components import Section

_NUMBER = re.compile("[0-9]{1,15}")


class Fragments:
    """The sections of a page, each with the number of the change it came with. A stamp is valid for one server only: a
    stamp of another one asks for every section."""

    def __init__(self) -> None:
        self.server = secrets.token_hex(4)
        self.changes = 0
        self.now: list[Section] = []
        self._since: dict[str, int] = {}

    @property
    def stamp(self) -> str:
        return f"{self.server}-{self.changes}"

    def show(self, sections: Sequence[Section]) -> None:
        """Replace the sections. Raises ValueError when two have the same id."""
        ids = [section.id for section in sections]
        if len(set(ids)) < len(ids):
            raise ValueError(f"the ids of a page's sections must differ, not {', '.join(ids)}")
        before = {section.id: section.html for section in self.now}
        changed = [section.id for section in sections if before.get(section.id) != section.html]
        if changed or len(sections) != len(self.now):
            self.changes += 1
        kept = {name: self._since.get(name, 0) for name in ids}
        self._since = {**kept, **dict.fromkeys(changed, self.changes)}
        self.now = list(sections)

    def since(self, stamp: str) -> dict:
        """{"stamp", "order": the id of every section, "sections": {id: html} of those that are new}."""
        server, _, number = stamp.rpartition("-")
        known = int(number) if server == self.server and _NUMBER.fullmatch(number) else -1
        new = {section.id: section.html for section in self.now if self._since[section.id] > known}
        return {"stamp": self.stamp, "order": [section.id for section in self.now], "sections": new}
