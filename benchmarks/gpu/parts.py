"""What `bench gpu` measures, in its order, with each part's share of the time."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu import decode
from benchmarks.harness import Bench, Job, Row
from benchmarks.kernels import blocks, correctness, fusions, kernels
from benchmarks.kernels.attention_providers import BRIEF, EVOFORMER, PROVIDERS
from benchmarks.training import operations, train

_LOSS = "linear + cross entropy"
_OTHERS = tuple(name for name in fusions.OPERATIONS if name != _LOSS)


@dataclass(frozen=True)
class Part:
    """One table. share: of the whole time; what a part leaves over goes to those behind it. jobs: its rows; with True
    those of a rehearsal on a CPU."""

    name: str
    question: str
    share: float
    jobs: Callable[[bool], list[Job]]
    ratios: Callable[[list[Row]], dict[str, float]]
    note: Callable[[Bench], str]


def _nothing(_: list[Row]) -> dict[str, float]:
    return {}


def _attention(dry: bool) -> list[Job]:
    """Every provider at base's shape, the most telling at large's."""
    return (
        kernels.jobs(("dry",), PROVIDERS)
        if dry
        else kernels.jobs(("base",), PROVIDERS) + kernels.jobs(("large",), BRIEF)
    )


def _steps(dry: bool) -> list[Job]:
    """Every step of base, what is compiled of large."""
    return train.jobs(("dry",)) if dry else train.jobs(("base",)) + train.jobs(("large",), brief=True)


def _base(dry: bool) -> tuple[str, ...]:
    return ("dry",) if dry else ("base",)


# by name; results of kernels, fusions and train are also those of `bench kernels`, `bench fusions` and `bench train`
PARTS = {
    part.name: part
    for part in (
        Part("correctness", correctness.QUESTION, 0.10, correctness.jobs, _nothing, correctness.note),
        Part(
            "kernels",
            kernels.QUESTION,
            0.22,
            _attention,
            kernels.ratios,
            kernels.note,
        ),
        Part(
            "cross_entropy",
            "the head and its loss, on one GPU",
            0.05,
            lambda dry: fusions.jobs(_base(dry), (_LOSS,)),
            fusions.ratios,
            fusions.note,
        ),
        Part(
            "fusions",
            fusions.QUESTION,
            0.06,
            lambda dry: fusions.jobs(_base(dry), _OTHERS),
            fusions.ratios,
            fusions.note,
        ),
        Part("train", train.QUESTION, 0.32, _steps, train.ratios, train.note),
        Part(
            "operations",
            operations.QUESTION,
            0.10,
            lambda dry: operations.jobs(_base(dry)),
            _nothing,
            operations.note,
        ),
        Part("decode", decode.QUESTION, 0.03, lambda _: decode.jobs(), decode.ratios, decode.note),
        Part("blocks", blocks.QUESTION, 0.09, lambda dry: blocks.jobs(_base(dry)), blocks.ratios, blocks.note),
        Part(
            "evoformer",
            "DeepSpeed's own attention with a bias, once it is compiled",
            0.03,
            lambda dry: kernels.jobs(_base(dry), (*PROVIDERS[:1], EVOFORMER)),
            kernels.ratios,
            kernels.note,
        ),
    )
}
