"""What a report says, put together: the whole content of <main>, from a run's record and the parts that cost more.

A pure function, so that a page of a running run can make the cheap parts again at every log line and the images once
a checkpoint. Must not know torch or any stage.
"""

import time

from beitforge.pipeline.reports import components, curves, summary
from beitforge.pipeline.runs.formatting import utc_time
from beitforge.pipeline.runs.record import RunRecord


def body(record: RunRecord, images_html: str, what_ran_html: str) -> str:
    """The sections in their order, each with an id of its own that stays: head, numbers, notes, probe, curves, gaps,
    survey, those of the images (pipeline.reports.gallery) and what-ran (pipeline.reports.provenance)."""
    parts = [
        summary.header(record),
        summary.cards(record),
        components.section("notes", "", "", components.notes(record.notes)),
        summary.probe(record),
        curves.curves(record),
        curves.gaps(record),
        curves.survey(record),
        images_html,
        what_ran_html,
        components.footer(f"Written {utc_time(time.time())} by beitforge, from {record.run}."),
    ]
    return "\n".join(part for part in parts if part)
