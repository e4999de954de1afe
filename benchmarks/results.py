"""What every benchmark writes, and how BENCHMARKS.md is rendered from it: `python -m benchmarks.results`."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
_PAGE = RESULTS.parents[1] / "BENCHMARKS.md"
ON_A_GPU = {
    "kernels": "attention with BEiT's bias beside its peers",
    "fusions": "cross entropy, jitter and what torch.compile leaves beside attention",
    "train": "one training step of base and large beside transformers, timm and the released code's arithmetic",
}
_HEAD = """# Benchmarks

What was measured, and how to measure it again. Speeds are ratios of things measured side by side in one run; absolute
numbers belong to the machine named. Each table is rendered from `benchmarks/results/NAME.json`.

    ./launch.sh bench                       # all of them
    ./launch.sh bench order                 # one

"""


def write(
    name: str, question: str, rows: list[dict], ratios: dict[str, float], notes: list[str], folder: Path = RESULTS
) -> None:
    """Write NAME.json into a folder; in results/ it is rendered into the page, elsewhere into NAME.md beside it. rows:
    one dict a line of the table, the same keys in each; keys that begin with _ are for computing ratios and stay out.
    """
    content = table(name, question, rows, ratios, notes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(as_json(content), encoding="utf-8")
    if folder == RESULTS:
        render()
    else:
        (folder / f"{name}.md").write_text(section(content), encoding="utf-8")


def table(name: str, question: str, rows: list[dict], ratios: dict[str, float], notes: list[str]) -> dict:
    """What a results file holds: the rows, and where and with what they were measured."""
    return {
        "name": name,
        "question": question,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_gpu()}, Python {platform.python_version()}",
        "versions": _versions(),
        "rows": [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows],
        "ratios": ratios,
        "notes": notes,
    }


def as_json(content: dict) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def launch(verb: str, words: list[str]) -> None:
    """`./launch.sh VERB …` with NPROC (two) processes; its complaint ends the benchmark."""
    environment = {"NPROC": "2", **os.environ, "BEITFORGE_PYTHON": sys.executable}
    command = [str(_PAGE.with_name("launch.sh")), verb, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _versions() -> dict[str, str]:
    """Of what is installed: a machine that measures kernels needs little."""
    versions = {}
    for package in (
        "torch",
        "triton",
        "deepspeed",
        "webdataset",
        "numpy",
        "pillow",
        "simplejpeg",
        "nvidia-nvimgcodec-cu12",
        "transformers",
        "timm",
        "liger-kernel",
        "nvidia-cudnn-frontend",
        "transformer-engine",
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def render() -> None:
    """BENCHMARKS.md from every results file."""
    sections = [section(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob("*.json"))]
    measured = {path.stem for path in RESULTS.glob("*.json")}
    waiting = [question for name, question in ON_A_GPU.items() if name not in measured]
    tail = "Nothing yet of multi-node scaling.\n"
    if waiting:
        tail = (
            f"Not measured on a GPU: {'; '.join(waiting)}. One call measures all of it in the minutes it is given, "
            "`./launch.sh bench gpu --minutes 8`; `./launch.sh bundle OUT` makes a folder that runs it on a machine "
            f"without network. {tail}"
        )
    _PAGE.write_text("".join([_HEAD, *sections, "## Open\n\n", tail]), encoding="utf-8")


def section(content: dict) -> str:
    """One benchmark's table in Markdown."""
    columns = list(content["rows"][0])
    lines = [f"## {content['name']}: {content['question']}", ""]
    lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(row[column]) for column in columns)} |" for row in content["rows"]]
    lines.append("")
    if content["ratios"]:
        lines += [", ".join(f"{name}: {_cell(value)}" for name, value in content["ratios"].items()) + ".", ""]
    lines += [f"{note}" for note in content["notes"]]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines += ["", f"{content['date']}, {content['machine']}; {versions}.", "", ""]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    render()
