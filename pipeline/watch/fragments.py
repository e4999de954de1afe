"""A page that changes while it is open: its parts, and which of them are new since a reader last asked.

The body of a page is cut into its outermost elements. Must not know runs, torch or any stage.
"""

import secrets
from collections import Counter
from dataclasses import dataclass
from html import escape
from html.parser import HTMLParser

_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@dataclass(frozen=True)
class Fragment:
    """An outermost element of a page's body. Its name stands in it, as the attribute data-part."""

    name: str
    html: str


def split(body_html: str) -> list[Fragment]:
    """The outermost elements in order. What stands between them is left out."""
    cutter = _Cutter(body_html)
    cutter.feed(body_html)
    cutter.close()
    return cutter.parts


class _Cutter(HTMLParser):
    """Finds where outermost elements begin and end. Each is called by its id, or its tag; of several called the same,
    the later ones are numbered."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.text, self.parts = text, list[Fragment]()
        self.lines = [0]  # where each begins, as the parser counts them
        while found := text.find("\n", self.lines[-1]) + 1:
            self.lines.append(found)
        self.names: Counter[str] = Counter()
        self.depth, self.begun, self.tag, self.called = 0, 0, "", ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.depth == 0:
            self.begun, self.tag, self.called = self._place(), tag, dict(attrs).get("id") or tag
        if tag not in _VOID:
            self.depth += 1
        elif self.depth == 0:
            self._end(self._place() + len(self.get_starttag_text() or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        self.depth -= 1
        if self.depth == 0:
            self._end(self.text.index(">", self._place()) + 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """<path … />: ends where it begins."""
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def _place(self) -> int:
        line, column = self.getpos()
        return self.lines[line - 1] + column

    def _end(self, place: int) -> None:
        self.names[self.called] += 1
        count = self.names[self.called]
        name = self.called if count == 1 else f"{self.called} {count}"
        head = self.begun + 1 + len(self.tag)
        html = f'{self.text[self.begun : head]} data-part="{escape(name)}"{self.text[head:place]}'
        self.parts.append(Fragment(name, html))


class Fragments:
    """The parts of a page, each with the number of the change it came with. Stamps are of one server: another's ask for
    everything."""

    def __init__(self) -> None:
        self.server = secrets.token_hex(4)
        self.changes = 0
        self.now: list[Fragment] = []
        self._since: dict[str, int] = {}

    @property
    def stamp(self) -> str:
        return f"{self.server}-{self.changes}"

    def show(self, parts: list[Fragment]) -> None:
        """These are the parts from now on."""
        before = {part.name: part.html for part in self.now}
        changed = [part.name for part in parts if before.get(part.name) != part.html]
        if changed or len(parts) != len(self.now):
            self.changes += 1
        kept = {part.name: self._since.get(part.name, 0) for part in parts}
        self._since = {**kept, **dict.fromkeys(changed, self.changes)}
        self.now = parts

    def since(self, stamp: str) -> dict:
        """{"stamp", "order": every part's name, "sections": {name: html} of those that are new}."""
        server, _, number = stamp.rpartition("-")
        known = int(number) if server == self.server and number.isdecimal() else -1
        new = {part.name: part.html for part in self.now if self._since[part.name] > known}
        return {"stamp": self.stamp, "order": [part.name for part in self.now], "sections": new}
