"""The evaluations inside a pretraining run: which images, what of them, and whether there is time.

Losses on held-out images, on never-trained views of images that the run has seen, and on trained views of the same
images (pipeline.evaluation.diagnostics has the rest). The gap between the last two says when K views are too few. All
ranks take part, each sample counts once whatever their number, and nothing here changes what training computes. Must
not know stages.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from beitforge.pipeline.config.settings import ONLINE, Config
from beitforge.pipeline.data.batches import even_batches
from beitforge.pipeline.data.labelled import labelled, refuse_other_classes
from beitforge.pipeline.data.pretraining import DataSource, fitting_tokenizer, heldout, new_views, seen_views
from beitforge.pipeline.distributed.collectives import World, all_max, all_sum, broadcast_object
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.evaluation import diagnostics
from beitforge.pipeline.tokenizers.precision import autocast_as
from beitforge.pipeline.tokenizers.storage import VisualTokenizer, codebook_use
from beitforge.pipeline.training.objectives import encoder_input, online_tokens
from beitforge.shards.format.manifest import read_token_manifest
from beitforge.shards.stream.loader import Batch

_LONG = 5.0  # seconds of the last evaluation from which on the next is announced
_CHOOSE = 10  # images that k-NN chooses from, for each that it is tested on


@dataclass(frozen=True, kw_only=True)
class EvaluationSets:
    """What a run is judged on. heldout: None without such sets. new: None where there is no tokenizer, and `absent`
    says why. labelled: none, one set, or one to choose from and one to test on."""

    heldout: DataSource | None
    seen: DataSource
    new: DataSource | None
    absent: str
    tokenizer: VisualTokenizer | None
    labelled: tuple[DataSource, ...]


def open_evaluation_sets(config: Config) -> EvaluationSets:
    """Open the sets. Raises ShardError or ConfigError for those that cannot be used; for new views nobody asked."""
    new, tokenizer, absent = None, None, ""
    try:
        tokenizer, identity = fitting_tokenizer(config)
        if config.data.tokens != ONLINE:
            _refuse_another(config, identity["fingerprint"])
        new = new_views(config)
    except ConfigError as error:
        absent = str(error)
    return EvaluationSets(
        heldout=heldout(config) if config.data.heldout_images else None,
        seen=seen_views(config),
        new=new,
        absent=absent,
        tokenizer=tokenizer,
        labelled=_labelled(config),
    )


def _refuse_another(config: Config, fingerprint: str) -> None:
    if fingerprint != read_token_manifest(config.data.tokens).tokenizer["fingerprint"]:
        raise ConfigError(f"{config.data.tokenizer} is not the tokenizer that {config.data.tokens} was made with")


def _labelled(config: Config) -> tuple[DataSource, ...]:
    """What k-NN reads: test images as many as held-out ones; a set for both gives a fifth to the test."""
    data, most = config.data, config.log.heldout_samples
    if not data.labelled_images:
        return ()
    if not data.labelled_test:
        return (labelled(config, data.labelled_images, 5 * most),)
    sets = labelled(config, data.labelled_images, _CHOOSE * most), labelled(config, data.labelled_test, most)
    refuse_other_classes(sets[0].stream.images, sets[1].stream.images)
    return sets


def with_tokens(config: Config, tokenizer: VisualTokenizer | None, batch: Batch) -> Batch:
    """The batch, on its device; one that brings the tokenizer's view instead of tokens gets its tokens."""
    if tokenizer is None or not batch.tokenizer_pixels.numel():
        return batch
    with autocast_as(config.tokenizer.precision, batch.tokenizer_pixels.device):
        return batch._replace(tokens=online_tokens(tokenizer.tokenize, batch))


@dataclass(frozen=True)
class Loss:
    """values: loss and masked_accuracy, over all masked patches, and samples. counts: of every token there, [V]."""

    values: dict[str, float]
    counts: Tensor


@torch.no_grad()
def losses(config: Config, engine: Engine, source: DataSource, samples: int, prepare: diagnostics.Prepare) -> Loss:
    """Of the first `samples` of a set, each once, on any number of ranks; without drop path."""
    world = engine.world
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    tokens_V = torch.zeros(config.tokenizer.vocabulary, dtype=torch.float64, device=world.device)
    micro = engine.setup.micro_batch
    batches = even_batches(config, source, samples=samples, micro=micro, rank=world.rank, world=world.size)
    for batch, weight_B in batches:
        batch, own_B = prepare(batch), weight_B.to(world.device) > 0
        mask_BN = batch.draws["mask"] & own_B[:, None]
        pixels_BCHW = encoder_input(config, batch, engine.dtype)
        loss, right, count = engine.model(pixels_BCHW, mask_BN, config.mask.num_patches, None, batch.tokens)
        totals += torch.stack([loss, right, count, own_B.sum()]).double()
        tokens_V += torch.bincount(batch.tokens[mask_BN], minlength=len(tokens_V))
    loss, right, count, seen = all_sum(totals).tolist()
    return Loss({"loss": loss / count, "masked_accuracy": right / count, "samples": seen}, all_sum(tokens_V))


class Budget:
    """Whether there is time for an evaluation: they may take `share` of the time since this was made."""

    def __init__(self, share: float, clock: Callable[[], float] = time.perf_counter):
        self.share, self.clock = share, clock
        self.started, self.spent, self.last = clock(), 0.0, 0.0

    def allows(self) -> bool:
        """Whether one more, as long as the last, stays within the share. The first does, unless the share is 0."""
        if not self.last:
            return self.share > 0
        return self.spent + self.last <= self.share * (self.clock() - self.started + self.last)

    def record(self, seconds: float) -> float:
        """Note an evaluation that has just ended; returns the share so far."""
        self.spent, self.last = self.spent + seconds, seconds
        return self.spent / max(self.clock() - self.started, seconds)


class Evaluations:
    """The evaluations of one start of a run: call it when one is due."""

    def __init__(self, config: Config, sets: EvaluationSets, world: World, steps: int, say: Callable[[str], None]):
        """steps: after the last of which there is one, unless log.evaluation_share is 0. Every rank makes one; say: of
        the first rank."""
        self.config, self.sets, self.world, self.steps, self.say = config, sets, world, steps, say
        self.budget = Budget(config.log.evaluation_share)
        self.told = False
        self.new = sets.new
        if all_max([float(sets.new is None)], world)[0]:
            self.new = None
            if self.budget.share:
                self._tell(f"no loss on new views: {sets.absent or 'another host has no such tokenizer'}")
        if sets.tokenizer is not None:
            sets.tokenizer.to(world.device)

    def _tell(self, line: str) -> None:
        if self.world.first:
            self.say(line)

    def __call__(self, engine: Engine, done: int) -> dict[str, dict[str, float]]:
        """Values by kind after step `done`; none where there is no time. The first rank's clock decides for all."""
        if not self.budget.share:
            return {}
        if not broadcast_object(done >= self.steps or self.budget.allows(), self.world):
            self._left_out(done)
            return {}
        if not self.budget.last or self.budget.last > _LONG:
            self._tell(f"evaluating after step {done}, on {len(self._kinds(done))} sets of images")
        started = time.perf_counter()
        # what was compiled runs no hooks that came later, and other shapes than training's would be compiled anew
        eager = torch.compiler.set_stance("force_eager") if self.config.train.compile else contextlib.nullcontext()
        with eager:
            found = self._measure(engine, done)
        seconds = time.perf_counter() - started
        found["survey"] |= {"seconds": seconds, "share": self.budget.record(seconds)}
        return found

    def _left_out(self, done: int) -> None:
        if not self.told:
            self._tell(
                f"no evaluation after step {done}: the last took {self.budget.last:.1f} s, and one more would make all "
                f"of them take more than log.evaluation_share {self.budget.share:g} of the time; others will be left "
                f"out without a word (rarer ones: log.heldout_every; shorter ones: log.heldout_samples)"
            )
        self.told = True

    def _kinds(self, done: int) -> dict[str, tuple[DataSource, int]]:
        """What losses are measured on, and how many samples of it."""
        sets, most = self.sets, self.config.log.heldout_samples
        seen = min(most, sets.seen.samples, done * self.config.train.global_batch)
        kinds = {} if sets.heldout is None else {"heldout": (sets.heldout, min(most, sets.heldout.samples))}
        kinds["seen_view"] = sets.seen, seen
        if self.new is not None:
            kinds["new_view"] = self.new, seen
        return kinds

    def _measure(self, engine: Engine, done: int) -> dict[str, dict[str, float]]:
        config, sets, kinds = self.config, self.sets, self._kinds(done)
        measured = {kind: losses(config, engine, *which, self._prepare) for kind, which in kinds.items()}
        found = {kind: loss.values for kind, loss in measured.items()}
        first = next(iter(kinds))  # held-out images where there are any
        use = codebook_use(measured[first].counts)
        found["survey"] = {f"targets_{name}": float(use[name]) for name in ("used", "perplexity")}
        found["survey"] |= diagnostics.measure(config, engine, *kinds[first], self._prepare)
        if sets.labelled:
            test = sets.labelled[1] if len(sets.labelled) > 1 else None
            found["survey"] |= diagnostics.knn(config, engine, sets.labelled[0], test)
        return found

    def _prepare(self, batch: Batch) -> Batch:
        return with_tokens(self.config, self.sets.tokenizer, batch.to(self.world.device))
