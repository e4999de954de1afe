"""The pieces of a report page: text in, HTML out. Every argument is text and is escaped, unless it is called `…_html`.

A page is one file: no network requests (its content policy forbids them), no fonts, complete without its script. Must
not know runs or torch.
"""

import base64
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Section:
    """One child element of <main>. id: its HTML id, unique on the page; html: empty where there is nothing to show."""

    id: str
    html: str


@dataclass(frozen=True)
class Card:
    """A headline number: its label, the value, and a line of detail."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Figure:
    """An encoded image, its caption, whether it is so small that its pixels should stay visible, and whether its
    caption is good news."""

    encoded: bytes
    format: str
    caption: str
    small: bool
    good: bool = False


@cache
def asset(package: str, name: str) -> str:
    """The text of the file `assets/name` of a package, read once."""
    return (files(package) / "assets" / name).read_text(encoding="utf-8")


def page(
    title: str,
    sections: Sequence[Section],
    *,
    bar_html: str = "",
    connect: str = "",
    script: str = "",
    style: str = "",
) -> str:
    """A whole HTML document. Undecodable bytes of file names (surrogates) are written as escapes.

    For a page that is served: bar_html stands above the sections, connect is where its scripts may connect to
    ("'self'"), style and script are added to the page's own; the script calls `start()` whenever it has replaced
    content of <main>.
    """
    styles = asset(__package__, "report.css") + style
    body_html = "\n".join(html for html in (bar_html, *(section.html for section in sections)) if html)
    policy = f"{_POLICY}; connect-src {connect}" if connect else _POLICY
    more = f"<script>{script}</script>" if script else ""
    html = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="referrer" content="no-referrer">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{styles}</style></head>\n'
        f"<body><main>\n{body_html}\n</main><script>{asset(__package__, 'charts.js')}</script>{more}</body></html>\n"
    )
    return html.encode("utf-8", "backslashreplace").decode("utf-8")


def header(eyebrow: str, title: str, status: str, good: bool, *leads: str) -> Section:
    """The page's head: where it comes from, its name, how the run stands, and sentences; the first is the largest."""
    lines = "".join(f'<p class="lead{"" if i else " big"}">{escape(lead)}</p>' for i, lead in enumerate(leads) if lead)
    return Section(
        "head",
        f'<header id="head"><p class="eyebrow">{escape(eyebrow)}</p><div class="head"><h1>{escape(title)}</h1>'
        f'<span class="status {"good" if good else "wait"}">{escape(status)}</span></div>{lines}</header>',
    )


def section(name: str, title: str, about: str, *parts_html: str) -> Section:
    """A heading, a sentence about what follows, and the parts; empty when there are no parts. name: its id."""
    body = "\n".join(part for part in parts_html if part)
    lead = f'<p class="section">{escape(about)}</p>' if about else ""
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return Section(name, f'<section id="{escape(name)}">{heading}{lead}{body}</section>' if body else "")


def notes(lines: Sequence[str]) -> str:
    """What is missing, and why."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>' if items else ""


def cards(items: Sequence[Card]) -> Section:
    """The headline numbers side by side, in full rows where their count allows."""
    columns = next((columns for columns in (4, 5, 3) if len(items) % columns == 0), 4)
    return Section(
        "numbers",
        f'<dl class="cards row{columns}" id="numbers">'
        + "".join(
            f'<div class="card"><dt>{escape(card.label)}</dt><dd class="value">{escape(card.value)}</dd>'
            f'<dd class="detail">{escape(card.detail)}</dd></div>'
            for card in items
        )
        + "</dl>",
    )


def card(inside_html: str) -> str:
    """A frame around something, by itself."""
    return f'<div class="card plain">{inside_html}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], strong: Container[tuple[int, int]] = ()) -> str:
    """A plain table that scrolls by itself where the page is narrow; without a head, the first column is one.

    strong: (row, column) of cells that stand out.
    """
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    many = " class=many" if len(head) > 4 else ""
    body = ""
    for i, row in enumerate(rows):
        first = f"<th>{escape(row[0])}</th>" if not head or not head[0] else f"<td>{escape(row[0])}</td>"
        cells = [f"<b>{escape(cell)}</b>" if (i, j) in strong else escape(cell) for j, cell in enumerate(row)]
        body += f"<tr>{first}{''.join(f'<td>{cell}</td>' for cell in cells[1:])}</tr>"
    return f'<div class="scroll"><table{many}>{f"<tr>{top}</tr>" if top else ""}{body}</table></div>'


def bars(head: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Shares by name as a table of bars; the first row is the one the others are compared with."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = ""
    for i, (name, shares) in enumerate(rows):
        best = "" if i else " best"
        cells = "".join(
            f'<td class="bar-cell"><div class="bar{best}"><i style="width:{65 * min(1.0, max(0.0, share)):.1f}%"></i>'
            f"<span>{share:.1%}</span></div></td>"
            for share in shares
        )
        body += f'<tr class="{best.strip()}"><th>{escape(name)}</th>{cells}</tr>'
    return f'<div class="card bars"><table><tr>{top}</tr>{body}</table></div>'


@dataclass(frozen=True)
class Block:
    """A stretch of a time line, from and to in [0, 1]; look: running or evaluating."""

    start: float
    end: float
    look: str


@dataclass(frozen=True)
class Tick:
    """A moment of a time line, in [0, 1]; look: skip or return."""

    at: float
    look: str
    text: str


def strip(title: str, blocks: Sequence[Block], ticks: Sequence[Tick], start: str, end: str) -> str:
    """A time line: blocks and ticks on a track, words for its two ends, and a legend when there is more than one look.

    Of many ticks at one place, only as many are drawn as can be told apart.
    """
    inner = "".join(
        f'<i class="{escape(block.look)}" style="left:{100 * block.start:.2f}%;'
        f'width:{100 * (block.end - block.start):.2f}%"></i>'
        for block in blocks
    )
    apart = {(tick.look, round(500 * tick.at)): tick for tick in ticks}
    inner += "".join(
        f'<b class="{escape(tick.look)}" style="left:{100 * tick.at:.2f}%" title="{escape(tick.text)}"></b>'
        for tick in apart.values()
    )
    looks = list(dict.fromkeys([block.look for block in blocks] + [tick.look for tick in ticks]))
    names = {"skip": "update left out", "return": "return to a checkpoint"}
    legend = "".join(f'<li class="{escape(look)}">{escape(names.get(look, look))}</li>' for look in looks)
    return (
        f'<div class="card strip"><h3>{escape(title)}</h3><div class="track">{inner}</div>'
        f'<div class="ends"><span>{escape(start)}</span><span>{escape(end)}</span></div>'
        f"{f'<ul class=looks>{legend}</ul>' if len(looks) > 1 else ''}</div>"
    )


def charts(charts_html: Sequence[str], *, large: bool = False) -> str:
    """Charts side by side, in rows that are full; nothing when there are none. large: two a row at most."""
    shown = [chart for chart in charts_html if chart]
    count = len(shown)
    columns = min(count, 2) if large else count if count < 5 else 4 if count % 4 in (0, 3) else 3
    return f'<div class="charts row{columns}">{"".join(shown)}</div>' if shown else ""


def image_row(name: str, about: str, images: Sequence[Figure], *, whole: bool = False) -> str:
    """One sample: its name, a word about it, and its images with captions. whole: of any shape, in their own."""
    cells = "".join(_cell(name, image) for image in images)
    title = f'<div class="about"><b title="{escape(name)}">{escape(name)}</b><span>{escape(about)}</span></div>'
    return f'<div class="card">{title if name else ""}<div class="row{" whole" if whole else ""}">{cells}</div></div>'


def neighbour_row(name: str, asked: Figure, strips: Sequence[tuple[str, Sequence[Figure]]]) -> str:
    """One image and, a line for each way of comparing, the images nearest to it."""
    lines = "".join(
        f'<h4>{escape(way)}</h4><div class="row">{"".join(_cell(f"{name}, {way}", image) for image in images)}</div>'
        for way, images in strips
    )
    title = f'<div class="about"><b title="{escape(name)}">{escape(name)}</b></div>'
    return (
        f'<div class="card">{title}<div class="near"><div class="row asked">{_cell(name, asked)}</div>'
        f"<div>{lines}</div></div></div>"
    )


def _cell(name: str, image: Figure) -> str:
    form = "jpeg" if image.format == "jpg" else image.format
    data = base64.b64encode(image.encoded).decode("ascii")
    return (
        f'<div><img{" class=small" if image.small else ""} alt="{escape(f"{name}: {image.caption}")}" '
        f'src="data:image/{form};base64,{data}"><span{" class=same" if image.good else ""} '
        f'title="{escape(image.caption)}">{escape(image.caption)}</span></div>'
    )


def image_grid(rows_html: Sequence[str]) -> str:
    """The samples, two in a row where there is room."""
    return f'<div class="images">{"".join(rows_html)}</div>' if rows_html else ""


def folds(items: Sequence[tuple[str, str, str]]) -> str:
    """Parts to unfold: (title, a word about it, its HTML)."""
    return (
        '<div class="card fold">'
        + "".join(
            f"<details><summary>{escape(title)}<span>{escape(about)}</span></summary>"
            f'<div class="inside">{inside_html}</div></details>'
            for title, about, inside_html in items
        )
        + "</div>"
    )


def code(text: str) -> str:
    """A file's text as it is."""
    return f"<pre>{escape(text)}</pre>"


def footer(text: str) -> Section:
    """The page's last line."""
    return Section("footer", f'<footer id="footer">{escape(text)}</footer>')
