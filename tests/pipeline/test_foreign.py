"""Foreign tokenizer files: what their publishers save is read, and whatever else a file asks for is refused in one
line, with nothing of it run. That the numbers are the publishers' is tests/peers' business.
"""

import argparse
import builtins
import copyreg
import functools
import json
import os
import pickle
import random
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.config import ConfigError
from pipeline.dalle import Dalle, DalleShape, Residual, flava_name
from pipeline.foreign import read_dalle_pickles, read_flava_codebook, read_vqkd
from pipeline.vqkd import Vqkd, VqkdShape, published_name

SHAPE = DalleShape(vocabulary=20, hidden=8, decoder_hidden=12, decoder_init=6, blocks_per_group=1, has_decoder=True)
VQKD = VqkdShape(vocabulary=10, code_size=4, layers=2, width=64, heads=1, input_size=16, patch_size=8)
FORMATS = pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


class Conv2d(nn.Module):
    """As OpenAI's: the parameters are w and b."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.n_in, self.device = conv.in_channels, torch.device("cpu")
        self.w, self.b = conv.weight, conv.bias


class Encoder(nn.Module):
    def __init__(self, blocks: nn.Module):
        super().__init__()
        self.use_mixed_precision, self.blocks = True, blocks


class EncoderBlock(nn.Module):
    def __init__(self, id_path: nn.Module, res_path: nn.Module):
        super().__init__()
        self.post_gain, self.id_path, self.res_path = 0.25, id_path, res_path


class Decoder(Encoder):
    pass


class DecoderBlock(EncoderBlock):
    pass


@pytest.fixture
def openai(monkeypatch) -> Callable[[nn.Module, str], nn.Module]:
    """Turns a half of ours into the module OpenAI's pickle holds, classes of dall_e and all."""
    for part, classes in {
        "encoder": (Encoder, EncoderBlock),
        "decoder": (Decoder, DecoderBlock),
        "utils": (Conv2d,),
    }.items():
        module = ModuleType(f"dall_e.{part}")
        module.__file__ = __file__  # the old format looks for the source
        monkeypatch.setitem(sys.modules, module.__name__, module)
        for made in classes:
            monkeypatch.setattr(made, "__module__", module.__name__)
            setattr(module, made.__name__, made)
    monkeypatch.setitem(sys.modules, "dall_e", ModuleType("dall_e"))

    def convert(module: nn.Module, part: str) -> nn.Module:
        if isinstance(module, nn.Conv2d):
            return Conv2d(module)
        if isinstance(module, Residual):
            block = EncoderBlock if part == "encoder" else DecoderBlock
            return block(convert(module.id_path, part), convert(module.res_path, part))
        if isinstance(module, nn.Sequential):
            return nn.Sequential(OrderedDict((name, convert(child, part)) for name, child in module.named_children()))
        return module

    return lambda half, part: (Encoder if part == "encoder" else Decoder)(convert(half.blocks, part))


@pytest.fixture
def encoder_file(tmp_path, openai) -> Path:
    dalle = filled(Dalle(SHAPE))
    torch.save(openai(dalle.encoder, "encoder"), tmp_path / "encoder.pkl")
    return tmp_path / "encoder.pkl"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def refusal(path: Path, read: Callable[[Path], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.isprintable()
    assert line.startswith(str(path))
    assert ": " in line  # what is wrong, and the cure
    return line


def encoder_of(path: Path) -> object:
    return read_dalle_pickles(path, None)


READERS = {"dalle": encoder_of, "vqkd": read_vqkd}


def in_zip(path: Path, data: bytes, *records: tuple[str, bytes]) -> Path:
    """A file as torch.save frames it, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", data), ("byteorder", b"little"), *records):
            archive.writestr(f"archive/{name}", content)
    return path


def before_1_6(path: Path, data: bytes) -> Path:
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts) + data + pickle.dumps([], 2))
    return path


@FORMATS
def test_dalle_is_read_without_its_classes(tmp_path, openai, monkeypatch, old):
    """Every weight as it was, with neither dall_e nor torch's own pickle functions at hand."""
    dalle = filled(Dalle(SHAPE))
    paths = [tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"]
    for half, path in ((dalle.encoder, paths[0]), (dalle.decoder, paths[1])):
        torch.save(openai(half, path.stem), path, _use_new_zipfile_serialization=not old)
    for name in ("dall_e", "dall_e.encoder", "dall_e.decoder", "dall_e.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        monkeypatch.delattr(torch._utils, name)
    shape, weights = read_dalle_pickles(*paths)
    assert shape == SHAPE
    assert weights.keys() == dalle.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in dalle.state_dict().items())
    shape, weights = read_dalle_pickles(paths[0], None)
    assert not shape.has_decoder
    assert all(name.startswith("encoder.") for name in weights)


@pytest.mark.parametrize("make", [lambda: Dalle(SHAPE), lambda: Vqkd(VQKD)], ids=["dalle", "vqkd"])
def test_a_fresh_module_draws_nothing(make):
    """A forgotten weight shows as NaN, and torch's own generator is left as it was."""
    before = torch.random.get_rng_state()
    module = make()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.isnan().all() for parameter in module.parameters())
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in make().parameters())


def test_a_dalle_without_decoder_says_so(encoder_file):
    shape, weights = read_dalle_pickles(encoder_file, None)
    dalle = Dalle(shape)
    dalle.load_state_dict(weights)
    assert not dalle.decodes
    with pytest.raises(ConfigError, match=r"no decoder.*decoder\.pkl beside encoder\.pkl"):
        dalle.decode(torch.zeros(1, 1, dtype=torch.int64), (1, 1))


def test_halves_in_each_others_place(tmp_path, openai):
    torch.save(openai(Dalle(SHAPE).decoder, "decoder"), tmp_path / "encoder.pkl")
    assert "holds a dall_e.decoder.Decoder, not a dall_e.encoder.Encoder" in refusal(
        tmp_path / "encoder.pkl", encoder_of
    )


def test_halves_of_two_models(encoder_file, openai):
    other = encoder_file.with_name("decoder.pkl")
    torch.save(openai(filled(Dalle(DalleShape(vocabulary=21, hidden=8, has_decoder=True))).decoder, "decoder"), other)
    line = refusal(other, lambda path: read_dalle_pickles(encoder_file, path))
    assert "blocks.input.w is of shape [128, 21, 1, 1], where [128, 20, 1, 1] is due" in line


@pytest.mark.parametrize("prefix", ["", "image_codebook."])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_flava(tmp_path, prefix, file):
    """Alone, and within a whole FLAVA, whose other weights are left."""
    half = filled(Dalle(SHAPE)).encoder
    weights = {prefix + flava_name(name): tensor for name, tensor in half.state_dict().items()}
    if prefix:
        weights["flava.text_model.embeddings.word_embeddings.weight"] = torch.ones(3, 3)
    save_file(weights, tmp_path / file) if file.endswith("rs") else torch.save(weights, tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps({"image_codebook_config": {"num_groups": 4}} if prefix else {}))
    shape, found = read_flava_codebook(tmp_path)
    assert (shape.vocabulary, shape.hidden, shape.blocks_per_group, shape.has_decoder) == (20, 8, 1, False)
    assert found.keys() == {f"encoder.{name}" for name in half.state_dict()}
    assert all(torch.equal(found[f"encoder.{name}"], tensor) for name, tensor in half.state_dict().items())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"num_groups": 3}', "num_groups 3"),
        ('{"image_codebook_config": {"num_groups": 5}}', "num_groups 5"),
        ("{", "damaged"),
        ("[]", "damaged"),
    ],
)
def test_flava_of_other_groups(tmp_path, content, words):
    """The number of groups changes the gain of every block, and shows in no weight."""
    (tmp_path / "config.json").write_text(content)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert words in refusal(tmp_path / "config.json", lambda path: read_flava_codebook(path.parent))


def test_no_flava(tmp_path):
    assert "neither model.safetensors nor" in refusal(tmp_path, read_flava_codebook)
    (tmp_path / "model.safetensors").write_bytes(b"--2024-01-01-- https://huggingface.co/")
    assert "cannot be read" in refusal(tmp_path / "model.safetensors", read_flava_codebook)
    save_file({"text_model.x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert "blocks.output.conv.weight is missing" in refusal(tmp_path / "model.safetensors", read_flava_codebook)


def vqkd_weights() -> dict[str, torch.Tensor]:
    """As published, by name."""
    weights = {published_name(name): tensor for name, tensor in filled(Vqkd(VQKD)).state_dict().items()}
    weights["encoder.patch_embed.proj.weight"] = weights["encoder.patch_embed.proj.weight"].view(64, 3, 8, 8)
    return weights | {"decoder.cls_token": torch.ones(1, 1, 64), "quantize.embedding.initted": torch.ones(1)}


@FORMATS
@pytest.mark.parametrize("key", ["model", "state_dict", ""])
def test_vqkd(tmp_path, key, old):
    """Under the keys that the released code looks for; what its training leaves beside them is not run."""
    content = {key: vqkd_weights()} if key else vqkd_weights()
    if key:
        groups = [{"lr": np.float64(1e-3), "betas": (0.9, 0.99)}]
        content |= {"optimizer": {"state": {0: {"exp_avg": torch.ones(5)}}, "param_groups": groups}, "epoch": 99}
        content |= {"args": argparse.Namespace(process_type="default", device=torch.device("cpu"), opt_betas=[0.9])}
    torch.save(content, tmp_path / "vqkd.pth", _use_new_zipfile_serialization=not old)
    shape, weights = read_vqkd(tmp_path / "vqkd.pth")
    assert shape == VQKD
    expected = filled(Vqkd(VQKD)).state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32(tmp_path, kind):
    """And views of a larger storage are cut out of it."""
    weights = {name: tensor.to(kind) for name, tensor in vqkd_weights().items()}
    whole = torch.stack([weights["encoder.fc_norm.weight"]] * 2, dim=1)
    weights["encoder.fc_norm.weight"] = whole[:, 1]
    torch.save({"model": weights}, tmp_path / "vqkd.pth")
    _, found = read_vqkd(tmp_path / "vqkd.pth")
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in found.values())
    assert torch.equal(found["norm.weight"], whole[:, 1].float())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("encode_task_layer.0.bias"), "lacks the weight 'encode_task_layer.0.bias'"),
        (lambda w: w.pop("encoder.blocks.0.norm1.weight"), "lacks the weight 'encoder.blocks.0.norm1.weight'"),
        (lambda w: w.pop("quantize.embedding.weight"), "quantize.embedding.weight is missing"),
        (lambda w: w.update({"encoder.blocks.1.gamma_1": torch.ones(64)}), "has a weight 'encoder.blocks.1.gamma_1'"),
        (lambda w: w.update({"encoder.fc_norm.bias": torch.ones(65)}), "is of shape [65], where [64] is due"),
        (lambda w: w.update({"encoder.pos_embed": torch.ones(1, 6, 64)}), "where [1, 5, 64] is due"),
        (lambda w: w.update({"encoder.pos_embed": torch.ones(1, 1, 64)}), "is of shape [1, 1, 64]"),
        (lambda w: w.update({"encoder.fc_norm.bias": torch.full((64,), float("nan"))}), "not finite"),
        (lambda w: w.update({"encoder.fc_norm.bias": 3}), "no plain tensor as 'encoder.fc_norm.bias'"),
        (lambda w: w.update({"encoder.fc_norm.bias": torch.ones(1).expand(64)}), "in 1 numbers"),
        (lambda w: w.clear(), "encoder.patch_embed.proj.weight is missing"),
    ],
)
def test_another_layout_is_refused(tmp_path, change, words):
    weights = vqkd_weights()
    change(weights)
    torch.save({"model": weights}, tmp_path / "vqkd.pth")
    assert words in refusal(tmp_path / "vqkd.pth", read_vqkd)


def test_another_range_of_pixels_is_refused(tmp_path):
    """What process_type changes shows in no weight."""
    torch.save({"model": vqkd_weights(), "args": argparse.Namespace(process_type="imagenet_norm")}, tmp_path / "a.pth")
    assert "process_type" in refusal(tmp_path / "a.pth", read_vqkd)


class Reduced:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def named(module: str, name: str, *arguments: object) -> bytes:
    """A pickle that calls module.name, whether there is such a thing or not."""
    call = pickle.dumps(arguments, 4)[:-1]
    texts = b"".join(b"\x8c" + struct.pack("B", len(text.encode())) + text.encode() for text in (module, name))
    return b"\x80\x04" + texts + b"\x93" + call[2:] + b"R."


CALLS = {
    "os.system": lambda mark: pickle.dumps(Reduced(os.system, f"touch {mark}"), 2),
    "eval": lambda mark: pickle.dumps(Reduced(builtins.eval, f"open({str(mark)!r}, 'w')"), 2),
    "exec in protocol 4": lambda mark: pickle.dumps(Reduced(builtins.exec, f"open({str(mark)!r}, 'w')"), 4),
    "open": lambda mark: pickle.dumps(Reduced(open, str(mark), "w"), 2),
    "functools.partial": lambda mark: pickle.dumps(Reduced(functools.partial, os.system, f"touch {mark}"), 2),
    "getattr": lambda mark: named("builtins", "getattr", "x", "upper"),
    "in a dall_e of its own": lambda mark: named("dall_e.os", "system", f"touch {mark}"),
    "dotted out of dall_e": lambda mark: named("dall_e.encoder", "os.system", f"touch {mark}"),
    "dotted from a class": lambda mark: named("dall_e.encoder", "Encoder.__init__.__globals__", f"touch {mark}"),
    "dotted from a function": lambda mark: named("torch._utils", "_rebuild_tensor_v2.__globals__", 1),
    "dotted module": lambda mark: named("os.path", "os.system", f"touch {mark}"),
    "Module itself": lambda mark: named("torch.nn.modules.module", "Module.__setstate__", {}, {"a": 1}),
    "torch.load again": lambda mark: pickle.dumps(
        Reduced(torch.storage._load_from_bytes, pickle.dumps(Reduced(os.system, f"touch {mark}"))), 2
    ),
    "torch.hub": lambda mark: named("torch.hub", "load", "x/y", "z"),
    "torch.jit": lambda mark: named("__torch__.dall_e.encoder", "Encoder", 1),
    "a Storage that is none": lambda mark: named("os", "systemStorage", f"touch {mark}"),
    "numpy.load": lambda mark: named("numpy", "load", str(mark), None, True),
    "numpy in old clothes": lambda mark: named("numpy.core.multiarray", "_reconstruct", str(mark)),
    "numpy's runstring": lambda mark: named(
        "numpy.testing._private.utils", "runstring", f"open({str(mark)!r}, 'w')", {}
    ),
    "_codecs": lambda mark: named("_codecs", "decode", b"x", "zip"),
    "rebuilt from a type": lambda mark: named("torch._tensor", "_rebuild_from_type_v2", 1, 2, 3, 4),
    "pickle": lambda mark: named("pickle", "loads", pickle.dumps(Reduced(os.system, f"touch {mark}"))),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("framed", [in_zip, before_1_6])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_run(tmp_path, call, framed, reader):
    """Whatever it asks for, wherever: one line that names it, and no mark on the disk."""
    mark = tmp_path / "mark"
    line = refusal(framed(tmp_path / "file.pkl", CALLS[call](mark)), READERS[reader])
    assert "asks for the global" in line
    assert "nothing of it was run" in line
    assert not mark.exists()


def test_these_pickles_would_have_run(tmp_path):
    """Else the test above could not fail."""
    pickle.loads(CALLS["os.system"](tmp_path / "mark"))
    assert (tmp_path / "mark").exists()


def test_nothing_is_imported(tmp_path, monkeypatch):
    """A module's own code is code, too."""
    (tmp_path / "dall_e_extra.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "dall_e_extra.Encoder" in refusal(in_zip(tmp_path / "a.pkl", named("dall_e_extra", "Encoder")), encoder_of)
    assert not (tmp_path / "mark").exists()
    assert "dall_e_extra" not in sys.modules


def test_the_extension_table_is_not_asked(tmp_path):
    """Python answers these codes from a cache, past find_class."""
    copyreg.add_extension("posix", "system", 240)
    try:
        data = pickle.dumps(Reduced(os.system, f"touch {tmp_path / 'mark'}"), 2)
        assert b"\x82\xf0" in data
        pickle.loads(pickle.dumps(os.system, 2))  # now it is cached
        assert "extension 240" in refusal(in_zip(tmp_path / "a.pkl", data), encoder_of)
    finally:
        copyreg.remove_extension("posix", "system", 240)
        copyreg.clear_extension_cache()
    assert not (tmp_path / "mark").exists()


class Identified(pickle.Pickler):
    """Pickles `identity` as a persistent object."""

    def persistent_id(self, value: object) -> object:
        return value.identity if isinstance(value, SimpleNamespace) else None


@pytest.mark.parametrize(
    "identity",
    [
        "0",
        ("storage",),
        ("storage", "FloatStorage", "0", "cpu", 1),
        ("module", "os", "posixpath.py", "import os"),
        ("storage", OrderedDict, "0", "cpu", 1),
        ("storage", argparse.Namespace, "0", "cpu", 1),
        ("storage", torch.FloatStorage, "0", "cpu", -4),
        ("storage", torch.FloatStorage, 0, "cpu", 4),
        ("storage", torch.FloatStorage, "0", "cpu", 4, ("1", 0, 4)),
        (argparse.Namespace, torch.FloatStorage, "0", "cpu", 4),
        7,
    ],
)
def test_persistent_objects_are_storages(tmp_path, identity):
    with open(tmp_path / "raw", "wb") as file:
        Identified(file, 2).dump(SimpleNamespace(identity=identity))
    path = in_zip(tmp_path / "a.pkl", (tmp_path / "raw").read_bytes(), ("data/0", bytes(16)))
    line = refusal(path, encoder_of)
    assert "persistent object" in line or "damaged" in line or "storage whose name" in line


GLOBAL = {
    "function": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "class": b"cdall_e.encoder\nEncoder\n",
    "dictionary": b"ccollections\nOrderedDict\n",
    "storage": b"ctorch\nFloatStorage\n",
}


@pytest.mark.parametrize("kind", GLOBAL)
@pytest.mark.parametrize(
    "tail",
    [
        b"N}U\x08__code__Us\x86b.",  # BUILD with slots on the global itself
        b"}U\x04evilNsb.",  # BUILD with a dictionary
        b"(NNe.",  # APPENDS to it
        b"(NNu.",  # SETITEMS in it
        b"(\x90.",  # ADDITEMS
        b")\x81)R.",  # NEWOBJ, then a call of the instance
        b")R}U\x04evilNsb)R.",  # BUILD on an instance, then a call of it
        b"))\x81}\x92.",  # NEWOBJ_EX
    ],
)
def test_tricks_with_what_is_admitted(tmp_path, kind, tail):
    """Setting attributes of a stand-in, calling it, filling it: the file is refused, and nothing of torch changes."""
    before = dict(vars(torch._utils._rebuild_tensor_v2)), dict(vars(torch.FloatStorage)), dict(vars(OrderedDict))
    refusal(in_zip(tmp_path / "a.pkl", b"\x80\x02" + GLOBAL[kind] + tail), encoder_of)
    assert before == (vars(torch._utils._rebuild_tensor_v2), vars(torch.FloatStorage), vars(OrderedDict))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (b"}U\x08_modulesq\x00}U\x01aq\x01h\x09sub", "holds no module of its own as"),  # a module in itself
        (b"}U\x0b_parametersq\x00}U\x01aq\x01K\x07ssb", "holds no plain tensor as 'a'"),
        (b"}U\x0b_parametersq\x00K\x07sb", "damaged"),
        (b"}U\x08_modulesq\x00}U\x01aq\x01K\x07ssb", "holds no module of its own as 'a.'"),
        (b"K\x07b", "damaged"),
        (b"", "blocks.output.conv.w is missing"),
    ],
)
def test_stand_ins_of_the_wrong_content(tmp_path, module, words):
    data = b"\x80\x02" + GLOBAL["class"] + b")\x81q\x09" + module.replace(b"sub", b"ssb") + b"."
    assert words in refusal(in_zip(tmp_path / "a.pkl", data), encoder_of)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "beyond"),  # LONG_BINPUT: a memo of 2³¹ places
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.", "damaged"),  # BINBYTES8 of 2⁶⁰ bytes
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "damaged"),  # LONG4
        (b"\x80\x02.", "damaged"),  # an empty stack
        (b"\x80\x02N", "damaged"),  # no end
        (b"\x80\x09N.", "damaged"),  # a protocol to come
        (b"", "damaged"),
    ],
)
def test_pickles_that_ask_for_much(tmp_path, data, words):
    assert words in refusal(in_zip(tmp_path / "a.pkl", data), encoder_of)


@FORMATS
def test_cut_files(tmp_path, openai, old):
    """A download that broke off, anywhere."""
    torch.save(openai(filled(Dalle(SHAPE)).encoder, "encoder"), tmp_path / "a", _use_new_zipfile_serialization=not old)
    data = (tmp_path / "a").read_bytes()
    path = tmp_path / "encoder.pkl"
    for share in (1e-4, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999):
        path.write_bytes(data[: max(1, int(share * len(data)))])
        assert any(word in refusal(path, encoder_of) for word in ("damaged", "is cut", "no file of torch.save"))


@FORMATS
def test_changed_bytes(tmp_path, openai, old):
    """Property over seeds: with other bytes in its pickle a file reads, or is refused in a line; nothing else."""
    torch.save(openai(filled(Dalle(SHAPE)).encoder, "encoder"), tmp_path / "a", _use_new_zipfile_serialization=not old)
    if old:
        data, rest = (tmp_path / "a").read_bytes(), {}
    else:
        with zipfile.ZipFile(tmp_path / "a") as archive:
            rest = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
        data = rest.pop("data.pkl")
        rest.pop("byteorder")
    path = tmp_path / "encoder.pkl"
    for seed in range(150):
        draw = random.Random(seed)
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 20])):
            changed[draw.randrange(20, len(data))] = draw.randrange(256)
        path.write_bytes(changed) if old else in_zip(path, bytes(changed), *rest.items())
        try:
            read_dalle_pickles(path, None)
        except ConfigError as error:
            assert "\n" not in str(error)


def test_a_text_is_no_tokenizer(tmp_path):
    """`wget -o encoder.pkl URL` writes its log there."""
    log = tmp_path / "encoder.pkl"
    log.write_text("--2024-05-01 10:00:00--  https://cdn.openai.com/dall-e/encoder.pkl\nResolving cdn.openai.com…\n")
    for read in (encoder_of, read_vqkd):
        line = refusal(log, read)
        assert "begins with b'--2024-05-01" in line
        assert "log of the download" in line


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b""), "no file of torch.save"),
        (lambda path: path.write_bytes(pickle.dumps(Reduced(os.system, "false"))), "no file of torch.save"),
        (lambda path: save_file({"x": torch.ones(1)}, path), "no file of torch.save"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "no file of torch.save"),
        (lambda path: torch.save({"x": torch.ones(1)}, path), "holds a dict, not a dall_e.encoder.Encoder"),
        (lambda path: torch.save(torch.ones(1), path), "holds a torch._utils._rebuild_tensor_v2, not a"),
        (lambda path: torch.save(nn.Linear(1, 1), path), "asks for the global 'torch.nn.modules.linear.Linear'"),
    ],
)
def test_other_files(tmp_path, make, words):
    make(tmp_path / "encoder.pkl")
    assert words in refusal(tmp_path / "encoder.pkl", encoder_of)


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pkl", "w") as archive:
        archive.writestr("photo.jpg", b"")
    assert "none of torch.save" in refusal(tmp_path / "a.pkl", encoder_of)
    with zipfile.ZipFile(tmp_path / "a.pkl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps("a" * 10_000_000))
    assert "compressed" in refusal(tmp_path / "a.pkl", encoder_of)
    assert "big-endian" in refusal(big_endian(tmp_path / "b.pkl"), encoder_of)


def big_endian(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/byteorder", b"big")
    return path


def test_a_script_archive(tmp_path):
    """torch.load would hand it to torch.jit, and so run it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), tmp_path / "a.pkl")
    assert "asks for the global '__torch__" in refusal(tmp_path / "a.pkl", encoder_of)
