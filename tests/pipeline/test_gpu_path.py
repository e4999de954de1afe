"""What a GPU would run, walked on the simulated one (tests/simulated_gpu.py): the same numbers as on the CPU, and no
tensor left behind there."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitforge.kernels import probe as kernels_probe
from beitforge.kernels.attention import attention
from beitforge.kernels.cross_entropy import linear_cross_entropy
from beitforge.kernels.pixels import jittered
from beitforge.pipeline.cluster.environment import rank_info
from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.config.settings import Config, Tokenizer
from beitforge.pipeline.data.augment import supervised_draws
from beitforge.pipeline.distributed.collectives import World
from beitforge.pipeline.doctor import device as checks_device
from beitforge.pipeline.doctor import kernels as checks_kernels
from beitforge.pipeline.doctor.findings import OK, Local, worst
from beitforge.pipeline.evaluation.attention_maps import attention_maps
from beitforge.pipeline.evaluation.neighbours import collect_features
from beitforge.pipeline.evaluation.probe import knn_accuracy, probe
from beitforge.pipeline.model.beit import Beit, Classifier, initialise
from beitforge.pipeline.stages.tokenizer import _objective
from beitforge.pipeline.tokenizers import dalle, vqkd
from beitforge.pipeline.tokenizers.dvae import Dvae
from beitforge.pipeline.tokenizers.precision import autocast_as, changed_tokens
from beitforge.pipeline.training import objectives
from beitforge.pipeline.training.prefetch import DevicePrefetcher
from beitforge.pipeline.weights.encoder import initialise_from, save_encoder
from beitforge.shards.stream.loader import Batch
from tests.pipeline.training.test_prefetch import batches
from tests.simulated_gpu import DEVICE, Gpu, GpuTensor, simulated_gpu
from tests.simulated_streams import Stream

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
CPU = torch.device("cpu")
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    with simulated_gpu(monkeypatch) as entered:
        yield entered


def values(found: object) -> object:
    """What came of something, on the CPU; a tensor that is not the GPU's is a fault."""
    if isinstance(found, dict):
        return {name: values(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [values(value) for value in found]
    if isinstance(found, Tensor):
        assert isinstance(found, GpuTensor), f"{tuple(found.shape)} is on the CPU"
        return found.detach().cpu()
    return found


def same(monkeypatch: pytest.MonkeyPatch, run: Callable[[torch.device], object], tolerance: float = 1e-5) -> list[str]:
    """What `run` gives on the CPU and on the GPU, compared; returns what it waits for there every time: what is asked
    once a process, as whether a kernel works, is not asked the second time."""
    plain = run(CPU)
    waits: list[str] = []
    for _ in range(2):
        with simulated_gpu(monkeypatch) as gpu:
            found = run(DEVICE)
            waits, there = list(gpu.waits), values(found)
        torch.testing.assert_close(there, plain, rtol=tolerance, atol=tolerance)
        if not waits:
            break
    return waits


def with_gradients(loss: Tensor, measures: dict[str, Tensor], module: nn.Module) -> list[object]:
    loss.backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return [loss.detach(), {name: value.detach() for name, value in measures.items()}, *gradients]


# What the simulated GPU refuses.


@pytest.mark.parametrize(
    ("mixed", "words"),
    [
        (lambda x: x + torch.ones(3), "all tensors to be on cuda:0"),
        (lambda x: torch.stack([x[0], torch.tensor(1.0)]), "all tensors to be on cuda:0"),
        (lambda x: x.index_select(0, torch.tensor([1])), "all tensors to be on cuda:0"),
        (lambda x: torch.rand(3, generator=torch.Generator(), device=DEVICE), "'cuda' device type for generator"),
        (lambda x: x.numpy(), "can't convert cuda:0"),
        (lambda x: np.asarray(x), "can't convert cuda:0"),
    ],
)
def test_what_cuda_refuses_is_refused(gpu, mixed, words):
    with pytest.raises((RuntimeError, TypeError), match=words):
        mixed(torch.ones(3, device="cuda"))


def test_what_cuda_takes_is_taken(gpu):
    """Numbers and their tensors, indices of the host, copies both ways; and what the host waits for is counted."""
    x = torch.arange(3.0, device="cuda")
    found = (x + torch.tensor(1.0))[torch.tensor([2, 0])]
    x.copy_(torch.zeros(3))
    assert gpu.waits == []
    assert (found.tolist(), x.cpu().tolist(), found.device) == ([3.0, 1.0], [0.0] * 3, DEVICE)
    assert gpu.waits == ["_to_copy"] * 2
    assert (float(x.sum()), x.new_ones(2).device, (x > 0).any().item()) == (0.0, DEVICE, False)


@pytest.mark.parametrize("operator", ["attention", "cross entropy", "pixels"])
def test_kernels_refuse_memory_of_the_host(gpu, operator):
    x = torch.randn(4, 8, device="cuda")
    rest = {"device": "cuda"}
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        if operator == "attention":
            attention(torch.randn(1, 5, 3, 1, 16, **rest), torch.zeros(1, 5, 5), None, "fused")
        elif operator == "cross entropy":
            counts = torch.ones(4)
            linear_cross_entropy(x, torch.randn(6, 8, **rest), x.new_zeros(6), x.argmax(1), counts, "fused")
        else:
            images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8, **rest), torch.ones(1, 3, **rest)
            jittered(*images, torch.zeros(1, dtype=torch.int64), torch.zeros(1, **rest), implementation="fused")


def test_a_race_is_found(gpu):
    """Read before the stream that writes was waited for; freed while another stream may read it."""
    side = Stream()
    with torch.cuda.stream(side):
        made = torch.ones(3).to(DEVICE)
    with pytest.raises(RuntimeError, match="a race"):
        made + 1
    torch.cuda.current_stream().wait_stream(side)
    made + 1
    del made
    assert gpu.faults == ["memory was freed that another stream may still read: record_stream is missing"]
    gpu.faults.clear()


# Losses of the three trainings.


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kernels", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("positions", ["relative_shared", "relative", "absolute"])
def test_masked_token_loss(tiny, monkeypatch, kernels, dtype, positions):
    """On a GPU auto is fused, if it passes the checks of the first step; no later one waits for the device."""
    config = load_config(str(tiny.config), [f"model.kernels={kernels}", f"model.positions={positions}"])
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, drop_path=0.3))
    batch = checks_device.synthetic_batch(config, 3, 0)

    def run(device: torch.device) -> list[object]:
        beit = Beit(config.model, config.tokenizer.vocabulary, 0).to(device, dtype)
        return with_gradients(*objectives.masked_token_loss(config, beit, batch.to(device), dtype), beit)

    if kernels == "auto":
        same(monkeypatch, run, CLOSE[dtype])
        assert all(kernels_probe._found.values()), "a kernel fell back"
    assert same(monkeypatch, run, CLOSE[dtype]) == []


def test_dvae_loss(tiny, monkeypatch):
    """Through the stage's objective, whose generator is the device's."""
    config = load_config(str(tiny.config), [])
    batch = checks_device.synthetic_batch(config, 3, 0)

    def run(device: torch.device) -> list[object]:
        dvae = Dvae(config.tokenizer, 0).to(device)
        world = World(0, 1, device)
        objective = _objective(config, dataclasses.make_dataclass("Engine", ["world"])(world), 10)
        return with_gradients(*objective(dvae, batch.to(device), 3), dvae)

    assert same(monkeypatch, run) == []


@pytest.mark.parametrize("mixes", [True, False])
def test_classification_loss(tiny, monkeypatch, mixes):
    """Erased, mixed, with drop path and dropout; and what a test set is judged by."""
    config = load_config(str(tiny.config), [])
    tune = dataclasses.replace(
        config.finetune, input_size=config.model.input_size, erase=1.0, drop_path=0.2, dropout=0.1
    )
    tune = tune if mixes else dataclasses.replace(tune, mixup=0.0, cutmix=0.0)
    drawn = supervised_draws(tune, config.model.layers, 0, np.arange(4))
    assert {"erase", "keep", "dropout"} <= drawn.keys() and ("share" in drawn) == mixes
    draws = {name: torch.from_numpy(value) for name, value in drawn.items()}
    batch = checks_device.synthetic_batch(config, 4, 0)._replace(draws=draws, labels=torch.arange(4))

    def run(device: torch.device) -> list[object]:
        classifier = Classifier(dataclasses.replace(config.model, drop_path=0.2), 4)
        initialise(classifier, 0)
        classifier.dropout, classifier.attention_dropout = 0.1, 0.0 if mixes else 0.1
        classifier.to(device)
        moved = batch.to(device)
        found = with_gradients(*objectives.classification_loss(config, classifier, moved, torch.float32), classifier)
        with torch.no_grad():
            logits = classifier(objectives.encoder_input(config, moved))
        return [*found, objectives.classified(logits, moved.labels, torch.tensor([1.0, 0, 1, 1]).to(device))]

    assert same(monkeypatch, run) == []


# Tokenizers, as `tokenize` and online tokens use them.


class Brightness(nn.Module):
    """A tokenizer of a user's: a field's mean."""

    decodes, stride, fixed_size = False, 8, None

    def tokenize(self, pixels_BCHW: Tensor) -> Tensor:
        return (F.avg_pool2d(pixels_BCHW, 8).mean(1) * 64).long().clamp(max=63).flatten(1)


def drawn(module: nn.Module) -> nn.Module:
    """Weights for one that waits for a file's."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return module


KINDS: dict[str, Callable[[], nn.Module]] = {
    "dvae": lambda: Dvae(Tokenizer(input_size=Size(32, 32), vocabulary=64, width=16, embedding=8), 0),
    "dalle": lambda: drawn(
        dalle.build({"vocabulary": 64, "hidden": 8, "decoder_hidden": 8, "decoder_init": 8, "has_decoder": True})
    ),
    "vqkd": lambda: drawn(
        vqkd.build(
            {"vocabulary": 64, "code_size": 8, "layers": 2, "width": 64, "heads": 2, "input_size": 32, "patch_size": 8}
        )
    ),
    "user class": Brightness,
}


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@pytest.mark.parametrize("kind", KINDS)
def test_online_tokens(tiny, monkeypatch, kind, precision):
    config = load_config(str(tiny.config), [])
    batch = checks_device.synthetic_batch(config, 3, 0)
    batch = batch._replace(tokenizer_pixels=batch.pixels)

    def run(device: torch.device) -> list[object]:
        tokenizer = KINDS[kind]().eval().to(device)
        with autocast_as(precision, device):
            tokens = objectives.online_tokens(tokenizer.tokenize, batch.to(device))
        return [tokens, tokenizer.decode(tokens, config.model.grid) if tokenizer.decodes else tokens]

    assert same(monkeypatch, run) == []


def test_what_another_precision_would_change(gpu):
    """What every token manifest says: of a GPU for tf32, too."""
    tokenizer = KINDS["dvae"]().to(DEVICE)
    assert changed_tokens(tokenizer, torch.rand(2, 3, 32, 32, device=DEVICE)).keys() == {"tf32", "fp16", "bf16"}


# Prefetch.


def test_prefetched_batches_arrive_whole_and_in_order(gpu):
    """The next one's copy is under way before it is asked for, on a stream of its own, and no race is seen."""
    taken: list[int] = []
    feed = DevicePrefetcher(batches(5, taken), DEVICE)
    for number in range(5):
        _, moved = feed.next()
        assert all(isinstance(tensor, GpuTensor) for tensor in moved.tensors())
        assert int((moved.pixels.float() + 1).mean()) == number + 1
        feed.prefetch()
        assert taken == list(range(min(5, number + 2)))
        del moved
    assert feed.waiting.read() > 0


@pytest.mark.parametrize("fault", ["wait_stream", "record_stream"])
def test_a_prefetcher_that_does_not_wait_is_found(gpu, monkeypatch, fault):
    """What the test above rests on."""
    monkeypatch.setattr({"wait_stream": Stream, "record_stream": GpuTensor}[fault], fault, lambda *_: None)
    feed = DevicePrefetcher(batches(2, []), DEVICE)
    if fault == "wait_stream":
        with pytest.raises(RuntimeError, match="a race"):
            feed.next()[1].pixels.float()
    else:
        _ = feed.next()[1].pixels.float()
        del feed
        assert gpu.faults
        gpu.faults.clear()


# Evaluation, probes, doctor, weights.


def test_probes(monkeypatch):
    """Fitted where the features are: every sweep, every fold and the choice."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = {f"layer {n}": torch.randn(60, 8, generator=generator) + n * F.one_hot(labels, 8) for n in range(3)}
    features["8×8"] = torch.randn(60, 5, generator=generator)

    def run(device: torch.device) -> object:
        there, known = {name: value.to(device) for name, value in features.items()}, labels.to(device)
        found = probe(there, known, there, known, default="layer 0", epochs=3)
        assert found.chosen and found.features == "layer 2"
        return [found.knn, found.linear, found.rate, found.layers, knn_accuracy(*(there["layer 1"], known) * 2, 3)]

    assert "index" not in same(monkeypatch, run)  # no mask that the host must count


def test_attention_maps_and_neighbours(tiny, monkeypatch):
    from beitforge.pipeline.data.pretraining import evaluation

    config = load_config(str(tiny.config), [])
    source = evaluation(config, config.data.images)
    pixels = torch.rand(2, 3, *config.model.input_size, generator=torch.Generator().manual_seed(0))

    def run(device: torch.device) -> object:
        beit = Beit(config.model, 64, 0).to(device)
        bank = collect_features(beit, source.stream, source.samples, 8, 60.0)
        maps = attention_maps(beit, pixels.to(device))
        return [bank.features.numpy(), bank.raw.numpy(), [dataclasses.asdict(each) for each in maps]]

    same(monkeypatch, run)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_doctor(tiny, gpu, precision):
    """Its looks at a device, the kernels' comparison, and what a step takes; a finding each, and no fault."""
    config, local = load_config(str(tiny.config), [f"train.precision={precision}"]), Local("here", 0)
    place = rank_info({})
    checks_device.health(place, DEVICE, local)
    checks_kernels.kernels(config, DEVICE, local)
    beit = Beit(config.model, config.tokenizer.vocabulary, 0)
    cost = checks_device.cost(config, beit, DEVICE, 1)
    assert checks_device.fits(config, cost, 4, 8, checks_device.free_memory(place, DEVICE), local)
    assert worst(local.found) == 0, local.found
    assert [finding.check for finding in local.found if finding.level == OK] == ["device", "kernels", "memory"]
    assert local.found[0].value == "NVIDIA H200"


def test_an_encoder_of_the_device_is_saved_and_loaded(tiny, gpu, tmp_path):
    from beitforge.pipeline.runs.checkpoints import State

    config: Config = load_config(str(tiny.config), [])
    state = State(step=1, samples_seen=8, world=1, zero_stage=0, precision="fp32", images="", tokens="", config="")
    ours, theirs = (Beit(config.model, 64, seed).to(DEVICE) for seed in (0, 1))
    save_encoder(Path(tmp_path), dict(ours.state_dict()), config, state)
    initialise_from(Path(tmp_path), theirs, 64)
    for name, value in theirs.state_dict().items():
        assert isinstance(value, GpuTensor) and torch.equal(value.cpu(), ours.state_dict()[name].cpu())


def test_every_tensor_of_a_batch_moves(gpu, tiny):
    """Pinned or not: none stays behind."""
    batch: Batch = checks_device.synthetic_batch(load_config(str(tiny.config), []), 2, 0)
    for whole in (batch, batch.pinned()):
        moved = whole.to(DEVICE)
        assert all(isinstance(tensor, GpuTensor) for tensor in moved.tensors() if tensor.numel())
