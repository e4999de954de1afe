"""What a report says, put together: the whole content of <main>, from a run's record and the parts that cost more.

A pure function, so that a page of a running run can make the cheap parts again at every log line and the pictures once
a checkpoint. Must not know torch or any stage.
"""

import time

from pipeline import curves, page, sections
from pipeline.record import Record
from pipeline.words import clock


def body(record: Record, pictures_html: str, what_ran_html: str) -> str:
    """The sections in their order, each with an id of its own that stays: head, numbers, notes, probe, curves, gaps,
    survey, those of the pictures (pipeline.gallery) and what-ran (pipeline.provenance)."""
    parts = [
        sections.header(record),
        sections.cards(record),
        page.section("notes", "", "", page.notes(record.notes)),
        sections.probe(record),
        curves.curves(record),
        curves.gaps(record),
        curves.survey(record),
        pictures_html,
        what_ran_html,
        page.footer(f"Written {clock(time.time())} by beitforge, from {record.run}."),
    ]
    return "\n".join(part for part in parts if part)
