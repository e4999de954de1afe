"""What every benchmark writes, and how BENCHMARKS.md is rendered from it: `python -m benchmarks.results`."""

import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent / "results"
_PAGE = _FOLDER.parents[1] / "BENCHMARKS.md"
_HEAD = """# Benchmarks

What was measured, and how to measure it again. Speeds are ratios of things measured side by side in one run; absolute
numbers belong to the machine named. Each table is rendered from `benchmarks/results/NAME.json`.

    ./launch.sh bench                       # all of them
    ./launch.sh bench order                 # one

"""


def write(name: str, question: str, rows: list[dict], ratios: dict[str, float], notes: list[str]) -> None:
    """Write results/NAME.json and render the page. rows: one dict a line of the table, the same keys in each."""
    packages = ("torch", "deepspeed", "webdataset", "numpy", "pillow")
    content = {
        "name": name,
        "question": question,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores, no GPU, Python {platform.python_version()}",
        "versions": {package: metadata.version(package) for package in packages},
        "rows": rows,
        "ratios": ratios,
        "notes": notes,
    }
    _FOLDER.mkdir(exist_ok=True)
    (_FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    render()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def render() -> None:
    """BENCHMARKS.md from every results file."""
    sections = [_section(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(_FOLDER.glob("*.json"))]
    tail = "Not measured on a GPU: attention, training throughput, MFU, multi-node scaling.\n"
    _PAGE.write_text("".join([_HEAD, *sections, "## Open\n\n", tail]), encoding="utf-8")


def _section(content: dict) -> str:
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
