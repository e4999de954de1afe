"""A checkpoint that somebody else has written runs nothing, on no path that reads one, whatever its digests say."""

import inspect
import io
import os
import pickle
import re
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from beitforge.pipeline.cli import main
from beitforge.pipeline.distributed import file_reader
from beitforge.pipeline.distributed.file_reader import read_file
from beitforge.pipeline.distributed.process_group import quiet_deepspeed
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.runs.checkpoints import SavedFile, read_state, sealed
from beitforge.shards.storage.reading import file_digest
from tests.conftest import ROOT
from tests.pipeline.checkpoints.test_integrity import NIGHTLY, SHORT, newest_of
from tests.pipeline.training.test_trainer import trained


class Planted:
    """What unpickling turns into a call."""

    def __init__(self, call: Callable, *arguments: object):
        self.call = call, arguments

    def __reduce__(self) -> tuple:
        return self.call


def doctor(path: Path, marker: Path) -> None:
    """Add to a file an object whose unpickling makes `marker`, as it would be added by somebody who knows the format:
    the checkpoint's own state says that the file is right."""
    quiet_deepspeed()
    content = torch.load(path, map_location="cpu", weights_only=False)  # one of our own
    torch.save({**content, "planted": Planted(os.system, f"touch {marker}")}, path)
    folder = path.parent
    state = read_state(folder)
    state.files[path.name] = SavedFile(bytes=path.stat().st_size, xxh3=file_digest(path))
    (folder / "state.json").write_bytes(sealed(state))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """Two processes under ZeRO-2; only the last checkpoint is there. Not to be changed."""
    run = tmp_path_factory.mktemp("saved") / "run"
    trained(tiny, run, *SHORT)
    shutil.rmtree(run / "checkpoints" / "step-2")
    return run


FILES = ["mp_rank_00_model_states.pt", *(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))]


@pytest.mark.parametrize("name", FILES)
def test_nothing_runs_on_any_path(tiny, run, tmp_path, name, capsys):
    """Resumed at the same shape and at another, exported, probed, reported, fine-tuned from: refused in one line."""
    copy, marker = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(run, copy)
    doctor(newest_of(copy) / name, marker)
    line = re.escape(f"{newest_of(copy) / name} is no checkpoint: it asks for posix.system, and nothing of it was run")
    everywhere = name == FILES[-1] or NIGHTLY
    for processes, more in ((2, []), (1, []), (2, ["train.zero_stage=3"])) if everywhere else ((2, []),):
        output = trained(tiny, copy, *SHORT, *more, processes=processes, code=2)
        assert len(re.findall(line, output)) == 1 and output.count("error: ") == 1 and "Traceback" not in output, output
    sets = [str(tiny.folder / "shards" / part) for part in ("train", "test")]
    for words in (["export", str(copy), str(tmp_path / "out")], ["probe", str(copy), *sets])[: 1 + everywhere]:
        capsys.readouterr()
        assert main(words) == 2
        assert len(re.findall(line, capsys.readouterr().err)) == 1
    if not everywhere:
        assert not marker.exists()
        return
    tuning = [f"data.labelled_images={sets[0]}", f"finetune.init={copy}", "finetune.duration=1 steps"]
    tuning += ["finetune.global_batch=8", "finetune.warmup=0 steps", "finetune.input_size=32", "data.labelled_test="]
    tuning += ["finetune.randaugment="]
    output = trained(tiny, tmp_path / "tuned", *tuning, verb="finetune", code=2)
    assert len(re.findall(line, output)) == 1 and "Traceback" not in output
    assert main(["report", str(copy), "--data"]) == 0  # a note in the page
    assert "nothing of it was run" in (copy / "report.html").read_text(encoding="utf-8")
    assert main(["verify", str(copy)]) == 0  # opens no pickle
    assert not marker.exists() and not (tmp_path / "out").exists()
    torch.load(newest_of(copy) / name, map_location="cpu", weights_only=False)
    assert marker.exists(), "the file would have run it"


def test_deepspeed_is_given_data_too(tmp_path):
    """Its own loader asks the engine that reads files, which is ours."""
    quiet_deepspeed()
    from beitforge.pipeline.distributed.file_writer import Writer

    torch.save({"a": Planted(os.system, f"touch {tmp_path / 'ran'}")}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="nothing of it was run"):
        Writer().load(str(tmp_path / "a.pt"))
    assert not (tmp_path / "ran").exists()


# One file, by every way a pickle has to name or call something.


def archive(
    path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None
) -> Path:
    """A file as torch.save frames it, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **(more or {})}.items():
            file.writestr(f"archive/{name}", content)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def calls(mark: Path) -> dict[str, bytes]:
    """Pickles that would run `touch mark`, or take hold of what could."""
    command = f"touch {mark}"
    touch = text(command)
    return {
        "GLOBAL, REDUCE": b"\x80\x02cposix\nsystem\n" + touch + b"\x85R.",
        "in a dictionary": b"\x80\x02}X\x01\x00\x00\x00acposix\nsystem\n" + touch + b"\x85Rs.",
        "protocol 4": pickle.dumps({"a": Planted(os.system, command)}, 4),
        "STACK_GLOBAL": b"\x80\x04" + text("posix") + text("system") + b"\x93" + touch + b"\x85R.",
        "INST": b"(" + touch + b"iposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\n" + touch + b"o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + text(command) + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n" + touch + b"\x85}\x92.",
        "BUILD": b"\x80\x02cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n)\x81}" + text("f")
        + b"cposix\nsystem\nsb.",
        "EXT1": b"\x80\x02\x82\x01.",
        "eval": b"\x80\x02cbuiltins\neval\n" + text("__import__('os').system('true')") + b"\x85R.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\n" + text("a") + text("upper") + b"\x86R.",
        "a name with dots": b"\x80\x02ctorch\nos.system\n" + touch + b"\x85R.",
        "torch.hub": b"\x80\x02ctorch.hub\nload\n" + text("a/b") + text("c") + b"\x86R.",
        "torch.load again": b"\x80\x02ctorch.storage\n_load_from_bytes\n" + text("x") + b"\x85R.",
        "functools.partial": b"\x80\x02cfunctools\npartial\ncposix\nsystem\n" + touch + b"\x86R.",
        "DeepSpeed's own": b"\x80\x02cdeepspeed.utils\nlogger\n.",
        "a persistent id": b"\x80\x02(" + text("module") + b"cposix\nsystem\n" + text("0") + text("cpu") + b"K\x01tQ.",
        "a function as data": b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\ns.",
        "a tensor's method": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\ncposix\nsystem\n"
        + touch + b"\x85}tR.",
    }  # fmt: skip


@pytest.mark.parametrize("way", calls(Path("x")))
def test_every_way_to_run_something_is_refused(tmp_path, way):
    path = archive(tmp_path / "file.pt", calls(tmp_path / "ran")[way])
    with pytest.raises(ConfigError) as caught:
        read_file(path)
    assert not (tmp_path / "ran").exists()
    line = str(caught.value)
    assert line.startswith(f"{path} is ") and "\n" not in line and len(line) < 500
    assert "weights_only" not in line and "add_safe_globals" not in line  # torch's advice to trust it


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")


def tensor(numbers: bytes, size: bytes, stride: bytes) -> bytes:
    """A pickled dictionary with a tensor over the storage `0`, which says that it has `numbers` numbers."""
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + numbers + b"tQK\x00" + size + stride
    return b"\x80\x02}" + text("a") + rebuilt + b"\x89ccollections\nOrderedDict\n)RtRs."


HUGE = b"\x8a\x05\x00\x00\x00\x00\x10"  # 2**36
BOMBS = {
    "a number said to be terabytes": tensor(b"K\x01", HUGE + b"\x85", b"K\x00\x85"),
    "a storage that is not there": tensor(HUGE, HUGE + b"\x85", b"K\x01\x85"),
    "bytearray": b"\x80\x02}" + text("a") + b"cbuiltins\nbytearray\n" + HUGE + b"\x85Rs.",
    "bytearray of Python 2": b"\x80\x02}" + text("a") + b"c__builtin__\nbytearray\n" + HUGE + b"\x85Rs.",
    "a tensor that is called for": b"\x80\x02}" + text("a") + b"ctorch\nTensor\n" + HUGE + b"\x85Rs.",
    "a storage that is called for": b"\x80\x02}" + text("a") + b"ctorch\nFloatStorage\n" + HUGE + b"\x85Rs.",
    "lists in lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "a number": b"\x80\x02K\x01.",
    "itself": b"\x80\x02}q\x00" + text("a") + b"h\x00s.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_asks_for_much_is_refused(tmp_path, bomb):
    path = archive(tmp_path / "file.pt", BOMBS[bomb], more={"data/0": b"\0\0\0\0"})
    if bomb == "itself":
        assert read_file(path)["a"].keys() == {"a"}
        return
    with pytest.raises(ConfigError) as caught:
        read_file(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def _old(path: Path) -> None:
    torch.save({"a": Planted(os.system, f"touch {path.parent / 'ran'}")}, path, _use_new_zipfile_serialization=False)


def _script(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Planted(os.system, f"touch {path.parent / 'ran'}"), 2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


OTHERS: dict[str, Callable[[Path], object]] = {
    "compressed": lambda path: archive(path, pickle.dumps({}, 2), zipfile.ZIP_DEFLATED),
    "torch before 1.6": _old,
    "torch before 0.1.10": _tar,
    "TorchScript": _script,
    "empty": lambda path: path.write_bytes(b""),
    "no archive": lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 1000),
    "a plain pickle": lambda path: path.write_bytes(pickle.dumps(Planted(os.system, f"touch {path.parent / 'ran'}"))),
}


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("other", OTHERS)
def test_files_of_another_kind_are_refused(tmp_path, other):
    OTHERS[other](tmp_path / "file.pt")
    with pytest.raises(ConfigError) as caught:
        read_file(tmp_path / "file.pt")
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_an_archive_with_two_pickles_is_refused(tmp_path):
    """Readers of archives differ in which of two they take."""
    path = archive(tmp_path / "file.pt", pickle.dumps({}, 2))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, 2))
    with pytest.raises(ConfigError, match=re.escape("no archive of torch.save")):
        read_file(path)


def test_what_may_be_made_only_holds_numbers():
    """None of the classes that a file may name does anything when it is made, filled, compared or dropped."""
    own = [
        (kind.__name__, name)
        for kind in file_reader._classes()
        for base in inspect.getmro(kind)
        if base.__module__.startswith("deepspeed")
        for name in ("__setstate__", "__reduce__", "__reduce_ex__", "__del__", "__new__", "__setattr__", "__getattr__")
        if name in vars(base) and not base.__name__.endswith("Enum")
    ]
    assert own == []


def test_content_of_another_shape_is_one_line(run, tmp_path):
    """Data that is no checkpoint's: fields that are missing, of another kind, or do not fit."""
    quiet_deepspeed()
    name = FILES[1]
    content = torch.load(newest_of(run) / name, weights_only=False)["optimizer_state_dict"]
    state = content["base_optimizer_state"]["state"]
    wrong = [
        {},
        {**content, "single_partition_of_fp32_groups": []},
        {**content, "single_partition_of_fp32_groups": [1, 2]},
        {**content, "single_partition_of_fp32_groups": [torch.zeros(0), torch.zeros(0)]},
        {**content, "single_partition_of_fp32_groups": [torch.zeros(3, 3), torch.zeros(3)]},
        {**content, "loss_scaler": None},
        {**content, "param_alignment_paddings": [[0], [0]]},
        {**content, "base_optimizer_state": {"state": {}}},
        {**content, "base_optimizer_state": {"state": {0: {**state[0], "hessian": torch.zeros(3)}, 1: state[1]}}},
        {**content, "base_optimizer_state": {"state": {0: {**state[0], "exp_avg": "x"}, 1: state[1]}}},
        {**content, "base_optimizer_state": {"state": {0: {**state[0], "step": torch.tensor(torch.nan)}, 1: state[1]}}},
        {**content, "base_optimizer_state": {"state": {0: {**state[0], "exp_avg": torch.zeros(5)}, 1: state[1]}}},
    ]
    from beitforge.pipeline.checkpoints import zero_layout

    for number, instead in enumerate(wrong):
        folder = tmp_path / str(number)
        shutil.copytree(newest_of(run), folder)
        torch.save({"optimizer_state_dict": instead}, folder / name)
        with pytest.raises(ConfigError) as caught:
            saved = zero_layout.open_checkpoint(folder, 2, [], FILES)
            for pieces in saved.pieces.values():
                for piece in pieces:
                    for value in piece.values:
                        saved.fill(*_target(saved, value, piece))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [[2**60], [2**62, 2**62], [-1], [1.5], ["a"], [2**33]])
def test_parameters_that_are_not_there_are_one_line(run, tmp_path, shape):
    """Nor is memory taken for them."""
    from beitforge.pipeline.checkpoints import zero_layout

    folder = Path(shutil.copytree(newest_of(run), tmp_path / "step-4"))
    content = torch.load(folder / FILES[0], weights_only=False)
    shapes = [{**group} for group in content["param_shapes"]]
    shapes[0][next(iter(shapes[0]))] = tuple(shape)
    torch.save({**content, "param_shapes": shapes}, folder / FILES[0])
    with pytest.raises(ConfigError) as caught:
        dict(zero_layout.open_checkpoint(folder, 2, [], FILES).weights())
    assert "\n" not in str(caught.value)


def _target(saved, value, piece):  # type: ignore[no-untyped-def]
    from beitforge.pipeline.checkpoints.zero_layout import Piece

    name = next(name for name, pieces in saved.pieces.items() if piece in pieces)
    return name, Piece(piece.start, {value: torch.zeros(piece.end - piece.start)})


def test_nothing_of_the_project_unpickles_freely():
    """Wherever something is loaded that could be a program."""
    found = []
    for top in ("pipeline", "shards", "kernels", "benchmarks"):
        for path in (ROOT / top).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            for call in re.finditer(
                r"torch\.load\(.*|torch\.hub|\bjoblib|\bshelve|\bdill\b|allow_pickle=True|marshal\.load|"
                r"yaml\.(?:unsafe_)?load\(.*|pickle\.loads?\(|\.load_checkpoint\(",
                source,
            ):
                safe = "weights_only=True" in call[0] or "a SafeLoader" in call[0]
                found += [] if safe else [f"{path.relative_to(ROOT)}: {call[0]}"]
    assert found == []
