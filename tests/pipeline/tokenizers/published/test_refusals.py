"""Foreign tokenizer files that are cut, damaged or hostile: refused in one line, with nothing of them run."""

import argparse
import builtins
import copyreg
import functools
import os
import pickle
import random
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.tokenizers.dalle import Dalle, read_dalle_pickles
from beitforge.pipeline.tokenizers.vqkd import read_vqkd
from tests.pipeline.tokenizers.published.conftest import FORMATS, SHAPE, encoder_of, filled, refusal

pytestmark = pytest.mark.usefixtures("one_thread")

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
        (lambda path: path.mkdir(), "is a folder"),
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
