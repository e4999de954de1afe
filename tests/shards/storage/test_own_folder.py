"""The cache's folder is one that nobody else can change, whatever another user has laid in its way."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.storage import own_folder
from beitforge.shards.storage.cache import Cache
from beitforge.shards.storage.own_folder import Unsafe, default_folder
from beitforge.shards.storage.own_folder import own_folder as opened
from tests.conftest import ROOT

ENTRY = f"{'0' * 16}/a.4x000000.part"
STRANGER = 54321


def keep(folder: Path) -> bool:
    return Cache(folder, 1000).keep_part(ENTRY, 10, lambda: b"x" * 10)


@pytest.fixture
def theirs(monkeypatch):
    """Everything made so far belongs to another user than the one who runs from now on; root's stays root's."""
    monkeypatch.setattr(own_folder, "_roots", lambda: ())
    monkeypatch.setattr(os, "getuid", lambda: STRANGER)


def test_what_is_made_is_ours_alone(tmp_path):
    assert keep(tmp_path / "a" / "b")
    for made in ("a", "a/b", "a/b/.locks", f"a/b/{'0' * 16}", f"a/b/{ENTRY}", "a/b/.locks/used"):
        assert (tmp_path / made).stat().st_mode & 0o077 == 0, made


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o2770, 0o757])
def test_a_folder_that_others_can_write_is_refused(tmp_path, mode):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(Unsafe, match=rf"cache can be written by others \(mode {mode:04o}\).*data\.cache=FOLDER"):
        keep(folder)


@pytest.mark.parametrize("inner", [".locks", "0" * 16])
def test_so_is_one_inside_it(tmp_path, inner):
    """It may have been open to others before, and what they made there still is."""
    (tmp_path / inner).mkdir()
    (tmp_path / inner).chmod(0o777)
    with pytest.raises(Unsafe, match=rf"{inner} can be written by others"):
        keep(tmp_path)


def test_a_folder_of_another_user_is_refused(tmp_path, theirs):
    with pytest.raises(ShardError, match=r"belongs to user \d+, who could put another in its place: set data\.cache"):
        keep(tmp_path / "cache")
    with pytest.raises(Unsafe, match="belongs to user"):
        own_folder._check_own(tmp_path.stat(), tmp_path, own_folder.CACHE)


@pytest.mark.parametrize(("mode", "refused"), [(0o777, True), (0o775, True), (0o1777, False), (0o755, False)])
def test_folders_above(tmp_path, mode, refused):
    """Who can replace a folder can replace the cache in it; in a sticky one only its owner and root can."""
    above = tmp_path / "above"
    above.mkdir()
    above.chmod(mode)
    if refused:
        with pytest.raises(Unsafe, match=r"above can be written by others .* who could replace what is in it"):
            keep(above / "cache")
    else:
        assert keep(above / "cache")


def test_links_of_ours_are_followed_and_those_of_others_are_not(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    (tmp_path / "far").symlink_to(tmp_path / "link")
    assert keep(tmp_path / "far" / "cache") and (tmp_path / "disk" / "cache" / ENTRY).exists()
    monkeypatch.setattr(own_folder, "_check_above", lambda found, at, path, what, _: refuse(at, what))

    def refuse(at: Path, what: str) -> None:
        if what == "link":
            raise Unsafe(f"link {at}")

    with pytest.raises(Unsafe, match=f"link {tmp_path}/far"):
        keep(tmp_path / "far" / "cache")


def test_links_in_a_circle_are_one_line(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ShardError, match="in a circle"):
        keep(tmp_path / "a" / "cache")


@pytest.mark.parametrize("name", ["used", "usage", "all"])
@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo"])
def test_laid_files_are_never_written(tmp_path, name, kind):
    """What lies where the cache's own files go, from a time when others could write there."""
    victim = tmp_path / "thesis.tex"
    victim.write_text("years of work")
    locks = tmp_path / "cache" / ".locks"
    locks.mkdir(parents=True, mode=0o700)
    for lock in [name] if name != "all" else ["used", "usage", *(f"{number:03d}" for number in range(256))]:
        if kind == "symlink":
            (locks / lock).symlink_to(victim)
        elif kind == "hard link":
            os.link(victim, locks / lock)
        else:
            os.mkfifo(locks / lock)
    with pytest.raises(ShardError, match="cache"):
        keep(tmp_path / "cache")
    assert victim.read_text() == "years of work"


def test_laid_entries_are_never_read_through_nor_removed(tmp_path):
    """A set's folder that is a link leads nowhere; an entry that is one is not there."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.4x000000.part").write_bytes(b"theirs")
    (outside / "b.4x000000.part.partial-00000000").write_bytes(b"theirs")
    cache = Cache(tmp_path / "cache", 1000)
    (tmp_path / "cache" / ("0" * 16)).symlink_to(outside)
    with pytest.raises(ShardError, match="cannot be used"):
        cache.keep_part(ENTRY, 10, lambda: b"x" * 10)
    assert cache.read(ENTRY, 0, 6) is None
    assert len(list(outside.iterdir())) == 2
    inside = tmp_path / "cache" / ("1" * 16)
    inside.mkdir(mode=0o700)
    (inside / "a.4x000000.part").symlink_to(outside / "a.4x000000.part")
    assert cache.read(f"{'1' * 16}/a.4x000000.part", 0, 6) is None


@pytest.fixture
def fresh():
    default_folder.cache_clear()
    yield
    default_folder.cache_clear()


def test_the_default_is_in_the_users_own_cache_folder(tmp_path, monkeypatch, fresh, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "beitforge" / "shards"
    default_folder.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/means/none")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "beitforge" / "shards"
    assert not caplog.text


@pytest.mark.parametrize("why", ["a file", "shared", "open to others", "no home", "read only"])
def test_where_there_is_none_it_is_in_tmpdir_with_a_line(tmp_path, monkeypatch, fresh, caplog, why):
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    if why == "a file":
        (tmp_path / "home" / ".cache").write_text("")
    elif why == "shared":
        monkeypatch.setattr(own_folder, "_shared_by_nodes", lambda device: "nfs4")
    elif why == "open to others":
        (tmp_path / "home").chmod(0o777)
    elif why == "read only":
        monkeypatch.setattr(os, "access", lambda *_, **__: False)
    else:
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    folder = default_folder()
    assert folder == tmp_path / "tmp" / f"beitforge-cache-{os.getuid()}"
    assert keep(folder) and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert caplog.text.count("\n") == 1 and "data.cache sets another" in caplog.text


def test_the_name_in_tmpdir_may_be_taken(tmp_path, monkeypatch, fresh):
    """It is predictable: then its owner counts, and nothing is written."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    laid = tmp_path / f"beitforge-cache-{os.getuid()}"
    (laid / ".locks").mkdir(parents=True)
    laid.chmod(0o777)
    with pytest.raises(Unsafe, match=r"can be written by others.*data\.cache"):
        keep(laid)
    assert not list((laid / ".locks").iterdir())


def test_nodes_share_some_file_systems():
    assert own_folder._shared_by_nodes(os.stat("/proc").st_dev) == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_another_user_cannot_empty_our_files():
    """The attack itself: links in the predictable folder before the victim's first use."""
    code = """if True:
        import encodings.ascii, os, random, socket, sys, traceback  # nothing is imported as another user
        from pathlib import Path
        sys.path.insert(0, "src")
        os.umask(0)
        folder = Path(sys.argv[1])
        def as_user(uid, what):
            if not (child := os.fork()):
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                code = 1
                try:
                    what()
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        from beitforge.shards.storage import remote
        from beitforge.shards.errors import ShardError
        laid, thesis = folder / "tmp" / "beitforge-cache-40001", folder / "home" / "thesis"
        def attack():
            (laid / ".locks").mkdir(parents=True)
            for name in ("used", "usage", *(f"{n:03d}" for n in range(256))):
                (laid / ".locks" / name).symlink_to(thesis)
        def victim():
            thesis.write_text("years")
            os.environ.update(HOME=str(folder / sys.argv[2]), TMPDIR=str(folder / "tmp"))
            os.environ.pop("XDG_CACHE_HOME", None)
            try:
                cache = remote.cache_for("http://127.0.0.1:1/x", "", 1.0)
                cache.keep_part("0123456789abcdef/a.part", 10, lambda: b"x" * 10)
                print("kept in", cache.folder)
            except ShardError as error:
                print("refused:", error)
            sys.stdout.flush()
            assert thesis.read_text() == "years"
        assert as_user(40002, attack) == 0
        sys.exit(as_user(40001, victim))
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for inner, mode in (("tmp", 0o1777), ("home", 0o700)):
            (folder / inner).mkdir()
            (folder / inner).chmod(mode)
        os.chown(folder / "home", 40001, 40001)
        said = []
        for home in ("home", "nowhere"):
            command = [sys.executable, "-c", code, name, home]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            said.append(done.stdout)
            subprocess.run(["rm", "-rf", *(folder / "tmp").glob("*")], check=True)
    assert f"kept in {folder}/home/.cache/beitforge/shards" in said[0]
    assert "refused:" in said[1] and "belongs to user 40002" in said[1] and said[1].count("\n") == 1


def test_a_folder_in_the_root(monkeypatch):
    """Nothing above it but the root itself."""
    with pytest.raises((ShardError, OSError)):
        opened(Path("/proc/cache"))
