"""Evaluations inside a run: what they measure against plain computations, on any number of ranks, under every stage."""

import functools
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.data.labelled import labelled
from beitforge.pipeline.data.pretraining import DataSource, fitting_tokenizer, heldout, new_views, seen_views
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.evaluation.evaluations import Budget, open_evaluation_sets
from beitforge.pipeline.evaluation.probe import feature_depth
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.training.metrics import Metrics
from beitforge.pipeline.training.objectives import encoder_input, online_tokens
from tests.conftest import ROOT
from tests.pipeline.evaluation.evaluation_ranks import CASES, encoder, with_case
from tests.pipeline.training.test_trainer import STEPS, trained
from tests.ranks import run_ranks

SAMPLES = 7  # divides by neither 2 nor 3
SETTINGS = ["train.global_batch=12", f"log.heldout_samples={SAMPLES}", "log.evaluation_share=1"]


@pytest.fixture(scope="module")
def settings(tiny) -> list[str]:
    sets = tiny.folder / "shards"
    return [str(tiny.config), *SETTINGS, f"data.labelled_images={sets}/train", f"data.labelled_test={sets}/test"]


@pytest.fixture(scope="module")
def config(settings) -> Config:
    return load_config(settings[0], settings[1:])


@pytest.fixture(scope="module")
def ranks(settings):
    """What tests.pipeline.evaluation.evaluation_ranks finds on `world` processes: a dict for each case."""

    @functools.cache
    def found(world: int) -> list[dict]:
        done = run_ranks("tests.pipeline.evaluation.evaluation_ranks", *settings, processes=world)
        assert done.returncode == 0, done.stderr
        return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))

    return found


def batch_of(config: Config, source: DataSource, samples: int):
    """The first samples of a set at once, with tokens."""
    batch = source.stream.batch(torch.arange(samples).numpy())
    if batch.tokenizer_pixels.numel():
        return batch._replace(tokens=online_tokens(fitting_tokenizer(config)[0].tokenize, batch))
    return batch


def predictions(config: Config, beit: Beit, batch) -> tuple[Tensor, Tensor]:
    """Logits of all masked patches [n, V] and their tokens [n], from the whole image's logits."""
    mask = batch.draws["mask"]
    return beit.all_logits(encoder_input(config, batch), mask)[mask], batch.tokens[mask]


def attention_probabilities(beit: Beit, states: list[Tensor]) -> list[Tensor]:
    """Of every block, from its input: [B, A, S, S] as written in the reference of the kernel."""
    found = []
    for block, x in zip(beit.blocks, states[:-1], strict=True):
        attention = block.attention
        b, s, d = x.shape
        bias = torch.cat([attention.q_bias, torch.zeros(d), attention.v_bias])
        qkv = F.linear(block.norm1(x), attention.qkv_weight, bias).view(b, s, 3, attention.heads, -1)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        own = attention.own_bias or beit.shared_bias
        found.append((logits if own is None else logits + own()).softmax(dim=-1))
    return found


def distances(config: Config, beit: Beit, pixels: Tensor) -> list[float]:
    """Patch by patch: Σ p · distance over Σ p, both without [S]."""
    states = beit.hidden(pixels, None, every=True)
    (_, columns), size, found = config.model.grid, config.model.patch_size, []
    for p in attention_probabilities(beit, states):
        total = torch.zeros(p.shape[:2])
        for i in range(config.model.num_patches):
            away = [
                size * ((i // columns - j // columns) ** 2 + (i % columns - j % columns) ** 2) ** 0.5
                for j in range(config.model.num_patches)
            ]
            row = p[:, :, 1 + i, 1:]
            total += (row * torch.tensor(away)).sum(dim=-1) / row.sum(dim=-1)
        found.append(float(total.mean()) / config.model.num_patches)
    return found


def nearest(config: Config, beit: Beit) -> float:
    """k-NN written out: the 20 nearest of all, by cosine of standardised features, votes exp(similarity / 0.07)."""

    def features(source: DataSource) -> tuple[Tensor, Tensor]:
        batch = batch_of(config, source, source.samples)
        states = beit.hidden(encoder_input(config, batch), None, every=True)
        return states[feature_depth(config.model.layers)][:, 1:].mean(dim=1), batch.labels

    data = config.data
    (known, labels) = features(labelled(config, data.labelled_images, 10 * SAMPLES))
    (asked, answers) = features(labelled(config, data.labelled_test, SAMPLES))
    mean, deviation = known.mean(dim=0), known.std(dim=0) + 1e-6
    cosines = F.cosine_similarity(((asked - mean) / deviation)[:, None], ((known - mean) / deviation)[None], dim=-1)
    right = 0
    for row, answer in zip(cosines, answers.tolist(), strict=True):
        votes = [0.0] * 5
        for place in row.argsort(descending=True)[:20].tolist():
            votes[int(labels[place])] += float((row[place] / 0.07).exp())
        right += votes.index(max(votes)) == answer
    return right / len(answers)


@torch.no_grad()
def plain(config: Config) -> dict[str, dict[str, float]]:
    """What an evaluation should find, in one process without an engine."""
    beit, found = encoder(config), {}
    sets = {"heldout": heldout(config), "seen_view": seen_views(config), "new_view": new_views(config)}
    for kind, source in sets.items():
        logits, tokens = predictions(config, beit, batch_of(config, source, SAMPLES))
        right = float((logits.argmax(dim=-1) == tokens).double().mean())
        found[kind] = {"loss": float(F.cross_entropy(logits, tokens)), "masked_accuracy": right, "samples": SAMPLES}
    apart = batch_of(config, sets["heldout"], SAMPLES)
    logits, tokens = predictions(config, beit, apart)
    survey = {"entropy": float(torch.distributions.Categorical(logits=logits).entropy().mean())}
    for name, kept in (("targets", tokens), ("predicted", logits.argmax(dim=-1))):
        share = torch.unique(kept, return_counts=True)[1] / len(kept)
        survey |= {f"{name}_used": len(share), f"{name}_perplexity": float((-share * share.log()).sum().exp())}
    reached = distances(config, beit, encoder_input(config, apart))
    survey |= {f"attention_distance_{number}": value for number, value in enumerate(reached, start=1)}
    found["survey"] = survey | {"knn": nearest(config, beit), "knn_samples": SAMPLES}
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_number_is_that_of_a_plain_computation(ranks, config, world):
    """Each sample once: 7 on 1, 2 and 3 ranks, under every ZeRO stage and every kind of positions."""
    for (stage, positions, precision), finding in zip(CASES, ranks(world), strict=True):
        found, expected = finding["found"], plain(with_case(config, positions))
        assert found.keys() == expected.keys()
        assert found["survey"].pop("seconds") > 0 and 0 < found["survey"].pop("share") <= 1
        for kind, values in expected.items():
            if precision == "fp32":
                assert found[kind] == pytest.approx(values, rel=1e-5), (stage, positions, kind)
            else:  # what rounding of the likeliest token does not turn over
                rough = {name for name in values if name in ("loss", "samples", "entropy") or "distance" in name}
                for name in rough:
                    assert found[kind][name] == pytest.approx(values[name], rel=0.05), (stage, positions, kind, name)


def test_losses_are_the_same_on_any_number_of_ranks(ranks):
    """To rounding: a unit in the last place of a loss of 4 is 1e-7 of it."""
    for case, *findings in zip(CASES, ranks(1), ranks(2), ranks(3), strict=True):
        for kind in ("heldout", "seen_view", "new_view"):
            one, two, three = (finding["found"][kind] for finding in findings)
            if case[2] == "fp32":
                assert two == pytest.approx(one, rel=1e-6) and three == pytest.approx(one, rel=1e-6), (case, kind)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_does_not_notice(ranks, world):
    """The losses of steps with an evaluation after each are those without, bit for bit, on every rank."""
    for case, finding in zip(CASES, ranks(world), strict=True):
        assert finding["same"], case
        assert finding["losses"][-1] != finding["losses"][0], "nothing was learned, so nothing was compared"


def test_the_cases_tell_apart(config):
    """What the comparison rests on: predictions and attention that are not uniform, and views that differ."""
    found = plain(config)
    assert found["survey"]["entropy"] < 0.9 * torch.tensor(64.0).log()
    assert len({found[kind]["loss"] for kind in ("heldout", "seen_view", "new_view")}) == 3
    uniform_attention = torch.cdist(*[torch.cartesian_prod(*[8.0 * torch.arange(4)] * 2)] * 2).mean()
    assert abs(found["survey"]["attention_distance_1"] - float(uniform_attention)) > 0.1


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.floats(0.001, 1), st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), max_size=30))
def test_evaluations_stay_within_their_share(share, events):
    """Whatever is between them: after one that was let through and took no longer than the one before, the share of the
    time is not beyond its bound, but for the first."""
    clock = Clock()
    budget = Budget(share, clock)
    for number, (training, evaluation) in enumerate(events):
        clock.now += training
        before, allowed = budget.last, budget.allows()
        assert allowed or number > 0, "the first one happens"
        if allowed:
            clock.now += evaluation
            so_far = budget.record(evaluation)
            assert so_far == pytest.approx(budget.spent / clock.now)
            if before and evaluation <= before:
                assert so_far <= share * (1 + 1e-9)


@given(st.lists(st.floats(0.1, 100), max_size=10))
def test_a_share_of_one_is_no_bound_and_of_none_leaves_all_out(seconds):
    clock = Clock()
    always, never = Budget(1.0, clock), Budget(0.0, clock)
    for one in seconds:
        assert always.allows() and not never.allows()
        clock.now += one
        always.record(one)


WANDB = importlib.util.find_spec("wandb") is not None


@pytest.fixture(scope="module")
def bounded(tiny, settings, tmp_path_factory) -> Iterator[Path]:
    """Two processes under ZeRO-3 with all parameters cut; next to no time for evaluations, which are due very often."""
    run = tmp_path_factory.mktemp("bounded") / "run"
    more = [*settings[3:], "log.evaluation_share=0.0001", "log.heldout_every=2 steps", "log.every_steps=1"]
    more += ["train.zero_stage=3", "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        output = trained(tiny, run, *more, *(["log.wandb=project"] if WANDB else []))
    assert output.count("no evaluation after step") == 1, output
    assert "no evaluation after step 4: the last took" in output
    yield run


KINDS = ("heldout", "seen_view", "new_view", "survey")


def test_what_there_is_no_time_for_is_left_out(bounded):
    """The first one due and the one at the end happen all the same; each says what evaluations took."""
    for kind in KINDS:
        assert [line["step"] for line in read_metrics(bounded, kind)] == [2, STEPS]
    assert all(line["seconds"] > 0 and 0.0001 < line["share"] < 1 for line in read_metrics(bounded, "survey"))


def test_a_training_with_a_little_time_for_them_does_not_notice(tiny, settings, bounded, tmp_path):
    """The same losses with an evaluation after every second step, bit for bit."""
    run = tmp_path / "run"
    more = [*settings[2:], "log.heldout_every=2 steps", "log.every_steps=1", "train.zero_stage=3"]
    output = trained(tiny, run, *more, "deepspeed.zero_optimization.stage3_param_persistence_threshold=0")
    assert "no evaluation" not in output
    for kind in KINDS:
        assert [line["step"] for line in read_metrics(run, kind)] == list(range(2, STEPS + 1, 2))
    losses, others = ([line["loss"] for line in read_metrics(where, "train")] for where in (run, bounded))
    assert losses == others and len(losses) == STEPS


def test_every_rank_says_where_it_stands(bounded):
    ranks = json.loads((bounded / "ranks.json").read_text())
    last = read_metrics(bounded, "train")[-1]
    assert ranks["step"] == STEPS and ranks["time"] == pytest.approx(last["time"], abs=5)
    assert [(row["rank"], row["host"]) for row in ranks["ranks"]] == [(n, socket.gethostname()) for n in range(2)]
    assert ranks["ranks"][0]["memory_bytes"] == last["memory_bytes"] > 1e6
    assert max(row["forward_seconds"] for row in ranks["ranks"]) == last["forward_seconds_slowest"]
    assert max(row["data_wait"] for row in ranks["ranks"]) == last["data_wait_worst"]
    assert json.loads((bounded / "environment.json").read_text())["device"]


def history(file: Path) -> list[dict]:
    """What was logged, out of wandb's own file: records of protobuf in the blocks of a LevelDB log."""
    from wandb.proto import wandb_internal_pb2

    data, place, part, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part, place = part + data[place + 7 : place + 7 + size], place + 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(part)
            part = b""
            if record.HasField("history"):
                items = record.history.item
                found.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return found


@pytest.mark.skipif(not WANDB, reason="wandb is not installed")
def test_weights_and_biases_hears_what_the_metrics_say(bounded):
    """Read from its own offline file: every value of every line, in order, and its step."""
    (file,) = (bounded / "wandb").glob("offline-run-*/*.wandb")
    assert (bounded / "wandb.id").read_text().strip() == file.stem.removeprefix("run-")
    heard = [{name: value for name, value in line.items() if name[0] != "_"} for line in history(file)]
    said = []
    lines = map(json.loads, (bounded / "metrics.jsonl").read_text().splitlines())
    for line in (line for line in lines if line["kind"] != "steps"):  # the bits of each step, for `replay` alone
        values = {name: value for name, value in line.items() if name not in ("step", "kind", "time")}
        said.append({"step": line["step"], **{f"{line['kind']}/{name}": value for name, value in values.items()}})
    assert heard == said and len(said) > STEPS


def test_without_wandb_the_cure_is_named(tiny, tmp_path, monkeypatch):
    config = load_config(str(tiny.config), ["log.wandb=project"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"log\.wandb is project, and wandb is not installed: pip install wandb, or"):
        Metrics(tmp_path / "run", True, config)


def test_no_tokenizer_no_new_views(tiny, config, tmp_path):
    """Recorded tokens are enough to train on; what new views lack is said."""
    without = open_evaluation_sets(load_config(str(tiny.config), [f"data.tokenizer={tmp_path}/none"]))
    assert without.new is None and "holds no finished tokenizer" in without.absent
    shutil.copytree(tiny.folder / "tokenizer", tmp_path / "torn")
    (tmp_path / "torn" / "tokenizer.safetensors").write_bytes(b"")
    assert (
        "sha256 differs"
        in open_evaluation_sets(load_config(str(tiny.config), [f"data.tokenizer={tmp_path}/torn"])).absent
    )
    assert open_evaluation_sets(config).absent == ""


def test_views_judged_are_those_they_say(config):
    """New views: of the images and under the masks of the seen ones, which training sees in its first epoch."""
    from beitforge.pipeline.data.pretraining import pretraining

    samples = np.arange(20)
    trained, seen, new = (make(config).stream.batch(samples) for make in (pretraining, seen_views, new_views))
    assert torch.equal(trained.pixels, seen.pixels) and torch.equal(trained.tokens, seen.tokens)
    assert torch.equal(seen.samples, new.samples) and torch.equal(seen.labels, new.labels)
    assert torch.equal(seen.draws["mask"], new.draws["mask"])
    assert not torch.equal(trained.draws["mask"], seen.draws["mask"])
    assert all(not torch.equal(one, other) for one, other in zip(seen.jitters, new.jitters, strict=True))
    assert "keep" in trained.draws and "keep" not in seen.draws and "keep" not in new.draws


def test_labelled_images_come_from_all_over_the_set(config):
    """A set sorted by class would otherwise be judged by its first classes."""
    source = labelled(config, config.data.labelled_images, 10)
    _, shards, rows = source.stream.places.locate(np.arange(10))
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == [divmod(5 * n, 16) for n in range(10)]
    assert labelled(config, config.data.labelled_images, 99).samples == 50


def test_sets_that_k_nn_cannot_use_are_one_line(tiny, settings, tmp_path):
    from tests.conftest import write_images

    def packed(name: str, *options: str) -> str:
        command = [
            sys.executable,
            "-m",
            "beitforge",
            "pack",
            str(tmp_path / "images"),
            str(tmp_path / name),
            *options,
        ]
        subprocess.run([*command, "--workers", "1"], check=True, cwd=ROOT, capture_output=True)
        return str(tmp_path / name)

    write_images(tmp_path / "images", 6, 2)
    (tmp_path / "images" / "class1").rename(tmp_path / "images" / "other")
    plain, others = packed("plain", "--labels", "none"), packed("others")
    with pytest.raises(
        ConfigError, match=r"plain.*has images without a label .*k-NN needs labelled shards: pack a folder"
    ):
        open_evaluation_sets(load_config(str(tiny.config), [f"data.labelled_images={plain}"]))
    with pytest.raises(ConfigError, match=r"data\.labelled_test has class"):
        open_evaluation_sets(load_config(str(tiny.config), [*settings[3:-1], f"data.labelled_test={others}"]))
