"""Every kind of tar member is taken, left out and counted, or refused with its cause and cure; none is passed over."""

import gzip
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from beitforge.pipeline.cli import main
from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import FLAG_LABELLED, MOST_IMAGE, index_path, open_index
from beitforge.shards.format.manifest import read_image_manifest
from beitforge.shards.inspect.verify import verify_images
from beitforge.shards.pack.adopt import Adopted, adopt
from beitforge.shards.pack.tar_scan import read_tar
from beitforge.shards.stream.image_set import ImageSet
from tests.shards.made_images import encoded, jpeg, photo, read_with_webdataset

J = jpeg()
Part = tuple[str, bytes] | tarfile.TarInfo


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write(folder: Path, parts: list[Part], name: str = "0", format: int = tarfile.GNU_FORMAT) -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / f"{name}.tar", "w", format=format) as tar:
        for part in parts:
            if isinstance(part, tarfile.TarInfo):
                tar.addfile(part)
            else:
                info = tarfile.TarInfo(part[0])
                info.size = len(part[1])
                tar.addfile(info, io.BytesIO(part[1]))
    return folder / f"{name}.tar"


def keys(folder: Path, name: str = "0") -> list[str]:
    index = open_index(index_path(folder, name))
    return [index.key(row) for row in range(len(index))]


def labels(folder: Path) -> list[int | None]:
    index = open_index(index_path(folder, "0"))
    return [
        label if flags & FLAG_LABELLED else None
        for label, flags in zip(index.label.tolist(), index.flags.tolist(), strict=True)
    ]


def clean(folder: Path) -> None:
    """The set verifies, and its images come out of a stream's reader."""
    found: list[str] = []
    verify_images(folder, True, 1, found.append)
    assert found == []
    for sample in ImageSet(folder):
        assert sample.pixels().shape


TWO: list[Part] = [("a.jpg", J), ("b.jpg", jpeg(1))]
STRAYS: list[tuple[Part, str]] = [
    (member("c.jpg", tarfile.LNKTYPE, "a.jpg"), "hard links"),
    (member("c.jpg", tarfile.SYMTYPE, "a.jpg"), "symbolic links"),
    (member("d", tarfile.DIRTYPE), "folders"),
    (member("c.jpg", tarfile.CHRTYPE), "devices"),
    (member("c.jpg", tarfile.BLKTYPE), "devices"),
    (member("c.jpg", tarfile.FIFOTYPE), "FIFOs"),
    (member("volume", b"V"), "members of other types"),
    (("._a.jpg", b"\0\5\x16\7"), "hidden files"),
    (("d/._a.jpg", b"\0\5\x16\7"), "hidden files"),
    (("d/.DS_Store", b"x"), "hidden files"),
    (("d/Thumbs.db", b"x"), "samples without an image"),
    (("classes.txt", b"cat"), "samples without an image"),
    (("c.json", b"{}"), "samples without an image"),
    (("c.cls", b"1"), "samples without an image"),
    (("c.gif", encoded(photo(seed=2), "GIF")), "images of other formats"),
    (("c.AVIF", b"x"), "images of other formats"),
    (("README", b"x"), "files whose names are no sample's"),
    (("__meta__/x.jpg", J), "files whose names are no sample's"),
    (("b.txt", b"caption"), ""),
    (("b.seg.png", encoded(photo(seed=2), "PNG")), ""),
]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize(("stray", "kind"), STRAYS, ids=lambda x: x if isinstance(x, str) else getattr(x, "name", ""))
def test_one_stray_member_is_counted_and_blocks_nothing(tmp_path, stray, kind, format):
    """At the end and, twice over, before the samples; only what belongs to a sample may stand beside it."""
    adopted = adopt(write(tmp_path / "set", [*TWO, stray], format=format).parent, 1)
    assert adopted.left_out.counts == ({kind: 1} if kind else {})
    assert adopted.manifest.made_by["left_out"] == adopted.left_out.counts
    assert keys(tmp_path / "set") == ["a", "b"]
    clean(tmp_path / "set")
    if kind and kind != "hard links":
        write(tmp_path / "set", [stray, *TWO], format=format)
        assert adopt(tmp_path / "set", 1).left_out.counts == {kind: 1}
        assert keys(tmp_path / "set") == ["a", "b"]


def test_what_is_left_out_is_said_with_its_cure_by_index_and_verify(tmp_path, capsys):
    """`b.jpg` is what `cp -al` makes of a copy, `c.jpg` a link; neither reader of tars follows them."""
    inside, tars = tmp_path / "in", tmp_path / "tars"
    inside.mkdir()
    tars.mkdir()
    (inside / "a.jpg").write_bytes(J)
    os.link(inside / "a.jpg", inside / "b.jpg")
    os.symlink("a.jpg", inside / "c.jpg")
    subprocess.run(["tar", "--sort=name", "-cf", str(tars / "0.tar"), "-C", str(inside), "."], check=True)
    assert [sample["__key__"] for sample in read_with_webdataset(tars / "0.tar")] == ["./a"]
    for verb in ("index", "index", "verify"):
        assert main([verb, str(tars), "--workers", "1"]) == 0
        said = capsys.readouterr().out
        assert "hard links: 1 (0.tar ./b.jpg); " in said and "`tar --hard-dereference`" in said
        assert "symbolic links: 1 (0.tar ./c.jpg); " in said and "`tar --dereference`" in said
    command = ["tar", "--sort=name", "--hard-dereference", "--dereference", "-cf", str(tars / "0.tar")]
    subprocess.run([*command, "-C", str(inside), "."], check=True)
    assert adopt(tars, 1).manifest.samples == 3  # as the cure says


def test_labels_and_facts_that_are_hard_links_are_taken(tmp_path):
    """A tool that links equal files makes one of all labels of a class."""
    parts: list[Part] = [("a.cls", b"1"), ("a.jpg", J), ("a.json", b"{}")]
    parts += [
        member("b.cls", tarfile.LNKTYPE, "a.cls"),
        ("b.jpg", jpeg(1)),
        member("b.json", tarfile.LNKTYPE, "a.json"),
    ]
    adopted = adopt(write(tmp_path / "set", parts).parent, 1)
    assert (labels(tmp_path / "set"), adopted.left_out.counts) == ([1, 1], {})
    assert adopted.manifest.classes == ["0", "1"]
    clean(tmp_path / "set")


@pytest.mark.parametrize("target", ["later.cls", "a.cls/", "", "nowhere"])
def test_a_label_that_links_to_nothing_is_counted(tmp_path, target):
    """A link leads to what stands before it."""
    parts: list[Part] = [member("a.cls", tarfile.LNKTYPE, target), ("a.jpg", J), ("later.cls", b"1"), ("later.jpg", J)]
    assert adopt(write(tmp_path / "set", parts).parent, 1).left_out.counts == {"hard links": 1}
    assert labels(tmp_path / "set") == [None, 1]
    clean(tmp_path / "set")


def sparse(folder: Path, flags: list[str], name: str = "s.jpg") -> Path:
    with open(folder / name, "wb") as file:
        file.write(J)
        file.seek(1 << 20)
        file.write(b"x")
    (folder / "set").mkdir(exist_ok=True)
    subprocess.run(["tar", "-S", *flags, "-cf", str(folder / "set/0.tar"), "-C", str(folder), name], check=True)
    return folder / "set"


@pytest.mark.parametrize(
    "flags", [[], *(["--format=pax", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0"))]
)
def test_sparse_members(tmp_path, flags):
    """Four ways to write one, none of which keeps the file's bytes together; none is a cut tar."""
    folder = sparse(tmp_path, flags)
    with pytest.raises(
        ShardError, match=r"hold no sample .*sparse files: 1 \(0.tar s\.jpg\); .*without `tar --sparse`"
    ):
        adopt(folder, 1)
    (tmp_path / "a.jpg").write_bytes(J)
    more = ["tar", "-S", *flags, "-rf", str(folder / "0.tar"), "-C", str(tmp_path), "a.jpg"]
    subprocess.run(more, check=True)
    assert adopt(folder, 1).left_out.counts == {"sparse files": 1}
    assert keys(folder) == ["a"]
    clean(folder)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (b"3", 3),
        (b" 3\r\n", 3),
        (b"-7", -7),
        (b"+2\n", 2),
        (b"tench", None),
        (b"", None),
        (b"1.0", None),
        (b"1 2", None),
        (b"9" * 30, None),
        (b"1" + b" " * 10_000, None),
        ("٣".encode(), None),
        (b"\xff\xfe3\0", None),
    ],
)
def test_labels(tmp_path, text, label):
    """A class name where a number should be costs the label and nothing else, and must not become some number."""
    adopted = adopt(write(tmp_path / "set", [("a.CLS", b"5"), ("a.jpg", J), ("b.jpg", J), ("b.cls", text)]).parent, 1)
    assert labels(tmp_path / "set") == [5, label]
    assert adopted.left_out.counts == ({} if label is not None else {"labels that are no integer": 1})
    clean(tmp_path / "set")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["0.input.jpg", "0.outputs.txt", "1.input.jpg"], ["0", "1"]),
        (["0.jpg", "0.left.jpg", "0.right.png"], ["0"]),
        (["a/0.JPG", "a/1.JPEG", "a/2.Png", "a/3.WEBP", "a/4.jfif", "a/5.jpe"], [f"a/{i}" for i in range(6)]),
        (["a.b/0.jpg", "../c.jpg", "/d.jpg", "./e.jpg"], ["a.b/0", "../c", "/d", "./e"]),
        (["a.txt", "b.jpg", "a.jpg"], ["b", "a"]),
        (["a.jpg", "b.jpg", "a.txt", "b.txt", "a.txt", "b.mask.png"], ["a", "b"]),
        (["é" * 200 + ".jpg", "deep/" * 60 + "a.jpg"], ["é" * 200, "deep/" * 60 + "a"]),
    ],
)
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_names_that_are_taken(tmp_path, parts, expected, format):
    """Dots, cases, places; a caption apart from its sample costs nothing."""
    adopt(write(tmp_path / "set", [(name, J) for name in parts], format=format).parent, 1)
    assert keys(tmp_path / "set") == expected
    clean(tmp_path / "set")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ["img.1.jpg", "img.2.jpg"],
            r"sample img .* 2 image members \(1.jpg, 2.jpg\): names are cut at their first dot",
        ),
        (
            [f"i.{n}.jpg" for n in range(9)],
            r"9 image members \(0.jpg, 1.jpg, 2.jpg, …\): .*rename the files \(i_0.jpg\)",
        ),
        (["i.1.jpg", "x.jpg", "i.2.jpg"], "names are cut at their first dot, so i.2.jpg belongs to i"),
        (["a.jpg", "a.png"], r"sample a at byte \d+ has 2 image members \(jpg, png\), it must have one"),
        (["a.jpg", "a.jpg"], r"the key has two \.jpg members: give every sample its own key"),
        (["a.jpg", "b.jpg", "a.jpg"], "used by an earlier sample too: give every sample its own key"),
        (["a.jpg", "b.jpg", "a.cls"], "must stand together: write the tar again, sorted by name"),
    ],
)
def test_names_that_are_refused(tmp_path, parts, message):
    """Each with its cause: a guess would read other samples than their maker made."""
    with pytest.raises(ShardError, match=message):
        read_tar(write(tmp_path / "set", [(name, J) for name in parts]))


def test_an_image_of_terabytes_is_counted_and_not_read(tmp_path, monkeypatch):
    """No reader takes one of over 2 GiB; the index would be made and then never opened."""
    monkeypatch.setattr("beitforge.shards.pack.tar_scan.MOST_IMAGE", len(J))
    adopted = adopt(write(tmp_path / "set", [("a.jpg", J), ("b.jpg", J + b"x")]).parent, 1)
    assert adopted.left_out.counts == {"images of more than 2 GiB": 1} and MOST_IMAGE == 2 << 30
    assert keys(tmp_path / "set") == ["a"]


@pytest.mark.parametrize(
    "name", ["0.tar.gz", "0.tgz", "0.tar.zst", "0.tar.bz2", "0.tar.xz", "0.TAR", "._0.tar", "0.zip"]
)
def test_folders_without_a_tar_that_can_be_read(tmp_path, name):
    """What is there is named, with the cure; beside a tar it is said and blocks nothing."""
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ShardError, match=rf"holds no \.tar that can be read: {name} is "):
        adopt(tmp_path, 1)
    write(tmp_path, TWO)
    assert adopt(tmp_path, 1).passed_over[0].startswith(f"{name} is ")
    clean(tmp_path)


def test_a_folder_of_folders_of_tars_is_named(tmp_path):
    write(tmp_path / "train", TWO)
    with pytest.raises(ShardError, match=r"holds no \.tar itself, but train in it do: give one of them"):
        adopt(tmp_path, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"x" * 999, mtime=0), r"it is compressed \(gzip\), .*: decompress it"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 999, r"it is compressed \(zstd\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS .* `git lfs pull`"),
        (b"<html>not found</html>" * 99, "not a plain, uncompressed tar: .* copy or download it again"),
        (b"", r"is empty \(zero bytes\).*, or remove it"),
    ],
)
def test_files_that_are_called_tar_and_are_none(tmp_path, data, message):
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(ShardError, match=message):
        adopt(tmp_path, 1)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_read(tmp_path, monkeypatch):
    """With the way to adopt the tars all the same, which works."""
    folder = write(tmp_path / "set", TWO).parent

    def refuse(dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr("beitforge.shards.pack.adopt.tempfile.TemporaryFile", refuse)
        patched.setattr("beitforge.shards.pack.adopt.scan_tar", None)
        with pytest.raises(ShardError, match=r"cannot be written \(Read-only file system\).*fill a folder of your own"):
            adopt(folder, 1)
    (tmp_path / "links").mkdir()
    (tmp_path / "links/0.tar").symlink_to(folder / "0.tar")
    adopt(tmp_path / "links", 1)
    assert sorted(path.name for path in folder.iterdir()) == ["0.tar"]
    clean(tmp_path / "links")


@pytest.fixture
def with_empty(tmp_path) -> Path:
    """A tar of samples, and what img2dataset leaves of a shard all of whose images failed."""
    write(tmp_path, TWO, "00000")
    write(tmp_path, [], "00001")
    write(tmp_path, [("x.json", b"{}"), ("x.txt", b"caption")], "00002")
    return tmp_path


def test_tars_without_samples_are_no_findings(with_empty, capsys):
    """`index` leaves them out, and `verify` sees why, as often as they are called."""
    for _ in range(2):
        assert main(["index", str(with_empty), "--workers", "1"]) == 0
        assert "00001.tar holds no sample: left out of the manifest" in capsys.readouterr().out
        assert main(["verify", str(with_empty), "--workers", "1", "--decode"]) == 0
        assert "2 samples in 1 shard, clean" in capsys.readouterr().out
    (with_empty / "00001.index.safetensors").unlink()  # another's index would not be there either
    clean(with_empty)


@pytest.mark.parametrize("kind", ["filled", "damaged", "folder", "link", "hidden"])
def test_what_is_no_empty_tar(with_empty, kind):
    """One that has become full asks for `index`, which helps; a damaged one is called so; what is no tar is none."""
    adopt(with_empty, 1)
    path = with_empty / "00001.tar"
    path.unlink()
    if kind == "filled":
        write(with_empty, [("new.jpg", J)], "00001")
    elif kind == "damaged":
        path.write_bytes(b"x" * 2000)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        (with_empty / "._00001.tar").write_bytes(b"\0\5\x16\7")
    found: list[str] = []
    verify_images(with_empty, False, 1, found.append)
    assert len(found) == (kind in ("filled", "damaged"))
    if kind == "filled":
        assert "run `index`" in found[0]
        assert adopt(with_empty, 1).manifest.samples == 3
    elif kind == "damaged":
        assert "not a plain, uncompressed tar" in found[0] and "run `index`" not in found[0]
    else:
        told: Adopted = adopt(with_empty, 1)
        assert len(told.passed_over) == 1
    if kind != "damaged":
        clean(with_empty)


def test_no_sample_at_all_says_what_was_there(tmp_path):
    write(tmp_path, [("x.json", b"{}"), member("y.jpg", tarfile.SYMTYPE, "z")])
    with pytest.raises(ShardError, match=r"hold no sample \(left out, samples without an image: 1 .*symbolic links: 1"):
        adopt(tmp_path, 1)
    assert not (tmp_path / "manifest.json").exists()


def test_a_set_of_the_version_before_is_read_as_it_was(with_empty):
    """Its indexes tell nothing of what was left out; nothing is asked for."""
    from beitforge.shards.format.index import write_index
    from beitforge.shards.pack.tar_scan import scan_tar

    adopt(with_empty, 1)
    path = index_path(with_empty, "00000")
    rows = scan_tar(with_empty / "00000.tar", lambda size: None).rows
    told = {name: open_index(path).metadata[name] for name in ("tar_bytes", "tar_digest")}
    write_index(path, rows, told)
    (with_empty / "manifest.json").unlink()
    adopted = adopt(with_empty, 1)
    assert (adopted.kept, adopted.left_out.counts) == (3, {"samples without an image": 1})
    assert read_image_manifest(with_empty).samples == 2
    clean(with_empty)
