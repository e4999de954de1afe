"""The sections of a report, from a run's record and the sections that are expensive to make.

A live page makes the cheap sections again at every log line and the images once a checkpoint. Must not know
torch or any stage.
"""

import time
from collections.abc import Sequence

from beitforge.pipeline.reports import components, curves, summary
from beitforge.pipeline.reports.components import Section
from beitforge.pipeline.runs.formatting import utc_time
from beitforge.pipeline.runs.record import RunRecord


def images_left_out(verb: str) -> Section:
    """In place of the images, where the user has not said that the data may be read."""
    line = (
        f"Images need the sets and the tokenizer that the config names, which are not read unasked, since "
        f"somebody else may have written it: `{verb} RUN --data` reads them."
    )
    return components.section("images", "Images", "", components.notes([line]))


def sections_of(record: RunRecord, images: Sequence[Section], what_ran: Section) -> list[Section]:
    """The sections in order, without empty ones: head, numbers, notes, probe, curves, gaps, survey, those of the images
    (pipeline.reports.gallery), what-ran (pipeline.reports.provenance) and footer."""
    sections = [
        summary.header(record),
        summary.cards(record),
        components.section("notes", "", "", components.notes(record.notes)),
        summary.probe(record),
        curves.curves(record),
        curves.gaps(record),
        curves.survey(record),
        *images,
        what_ran,
        components.footer(f"Written {utc_time(time.time())} by beitforge, from {record.run}."),
    ]
    return [section for section in sections if section.html]
