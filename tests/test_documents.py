"""Documents, docstrings and comments: every citation leads to something that exists; words out of use stay so."""

import io
import re
import subprocess
import tokenize
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

_SUFFIXES = (".py", ".md", ".sh", ".yaml", ".sbatch", ".js", ".css")
# tests that name wrong things on purpose
_PLANTED = ("tests/test_documents.py", "tests/test_folder_rules.py", "tests/test_extension.py", "tests/test_package.py")
# names on disk, which stay: options of packing, files of the demo, keys of the tests' images
_ON_DISK = re.compile(r"[\"']pictures?[\"']|pictures\.txt|picture\{number")
_LINK = re.compile(r"\[[^\]\n]+\]\(([^)\s]+)\)")
_PATH = re.compile(
    r"(?<![\w/.$}-])((?:pipeline|shards|kernels|tests|benchmarks|configs|docs)/[\w/-]+"
    r"\.(?:py|md|yaml|sh|sbatch|js|css))\b"
)
_MODULE = re.compile(
    r"(?<![\w/.{\"'-])(?:beitforge\.)?((?:pipeline|shards|kernels)(?:\.(?!__)[A-Za-z_]\w*)+)"
    r"(?![\w/*({-])"
)
_SECTION = re.compile(r"\b(docs/\w+\.md)(?:'s)?,\s+\"([^\"]+)\"")
_BENCHMARK = re.compile(r"\bBENCHMARKS(?:\.md)?, (\w+)")
_OUT_OF_USE = re.compile(
    r"\b(pictures?|mend(?:s|ed|ing)?|in vain|so many|so much of|does without|makes room|goes on (?:from|under|when)"
    r"|said once|whoever knows|in silence|standing still|made anew|comes out other|not well with|letters to"
    r"|rounds? otherwise|end to waiting|what is new to it|where it looks|finds alike|begins anew)\b",
    re.IGNORECASE,
)


@cache
def tracked() -> tuple[Path, ...]:
    """The text files of the repository, relative to its root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [Path(name) for name in listed.stdout.splitlines() if name.endswith(_SUFFIXES)]
    return tuple(name for name in names if (ROOT / name).is_file() and str(name) not in _PLANTED)


def prose(name: Path, text: str) -> str:
    """What a file says to people: of Python its comments and strings, of anything else all of it."""
    if name.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(token.string for token in tokens if token.type in (tokenize.COMMENT, tokenize.STRING))


@cache
def headings(document: Path) -> tuple[str, ...]:
    return tuple(re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE))


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def module_exists(dotted: str) -> bool:
    """Whether pipeline.x.y is a module, or a name that stands in one."""
    place, parts = ROOT, dotted.split(".")
    for number, part in enumerate(parts):
        if (place / part).is_dir():
            place /= part
            continue
        held = place / f"{part}.py"
        rest = parts[number + 1 :] if held.exists() else parts[number:]
        text = (held if held.exists() else place / "__init__.py").read_text(encoding="utf-8")
        return all(re.search(rf"\b{re.escape(attribute)}\b", text) for attribute in rest)
    return True


def broken(name: Path, text: str) -> list[str]:
    """The citations of a text that lead nowhere. `name`: where it stands, relative to the root."""
    said, wrong = prose(name, text), []
    for target in _LINK.findall(said) if name.suffix == ".md" else ():
        file, _, place = target.partition("#")
        document = (ROOT / name.parent / file) if file else ROOT / name
        if "://" in target:
            continue
        if not document.exists() or (place and place not in map(anchor, headings(document))):
            wrong.append(target)
    wrong += [path for path in _PATH.findall(said) if not (ROOT / path).exists()]
    wrong += [dotted for dotted in _MODULE.findall(said) if not module_exists(dotted)]
    for document, section in _SECTION.findall(said):
        if not (ROOT / document).exists() or section not in headings(ROOT / document):
            wrong.append(f"{document}, {section}")
    benchmarks = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    wrong += [f"BENCHMARKS.md, {cited}" for cited in _BENCHMARK.findall(said) if cited not in benchmarks]
    return wrong


def out_of_use(name: Path) -> list[str]:
    """Every place in a file where a word out of use stands."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [(number, _OUT_OF_USE.search(_ON_DISK.sub("", line))) for number, line in enumerate(lines, 1)]
    return [f"{name}:{number}: {word[0]}" for number, word in found if word]


def test_citations_lead_somewhere() -> None:
    wrong = {str(name): broken(name, (ROOT / name).read_text(encoding="utf-8")) for name in tracked()}
    assert {name: cited for name, cited in wrong.items() if cited} == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "[x](docs/nowhere.md)"),
        ("README.md", "[x](docs/recipe.md#nowhere)"),
        ("README.md", "see pipeline/machines.py"),
        ("pipeline/a.py", '"""See pipeline.model.nowhere."""'),
        ("pipeline/a.py", "# pipeline.model.beit.Nowhere says so"),
        ("pipeline/a.py", '"""As published (docs/recipe.md, "Nowhere")."""'),
        ("pipeline/a.py", "# measured: BENCHMARKS.md, nowhere_measured"),
    ],
)
def test_a_wrong_citation_is_found(name: str, text: str) -> None:
    assert broken(Path(name), text)


def test_words_out_of_use() -> None:
    assert [found for name in tracked() for found in out_of_use(name)] == []


@pytest.mark.parametrize("line", ["# a picture of it", "MENDED = 1", "it waits in vain", "it goes on from step 3"])
def test_a_word_out_of_use_is_found(line: str) -> None:
    assert _OUT_OF_USE.search(line)
