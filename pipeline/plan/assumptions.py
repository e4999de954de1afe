"""What `plan` assumes and cannot compute: each number with its origin, each replaceable by a measured one.

Must not know torch.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import shown
from beitforge.pipeline.reading import read_object
from beitforge.pipeline.runs.jsonl import count, metric_line, read_lines, value

_LARGEST = 1e24  # of an assumption, and 1 / this the smallest: products of them must stay numbers


def _assumed(value: float, unit: str, source: str) -> Any:
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Measured where `origins` says so, else the default with its source. 0 means: follows from the others."""

    achieved_flops: float = _assumed(
        0.0, "FLOP/s", "of one GPU in a step, operations as MFU counts them; 0: from what follows"
    )
    matrix_flops: float = _assumed(0.0, "FLOP/s", "of one GPU in a large 16-bit product; 0: peak × matrix_share")
    matrix_share: float = _assumed(
        0.60,
        "",
        "of peak in a ViT's products: fits published runs on A100, H100, RTX 3090 (benchmarks, plan_published)",
    )
    memory_bandwidth: float = _assumed(0.0, "bytes/s", "of one GPU in a copy; 0: peak × memory_share")
    memory_share: float = _assumed(0.90, "", "of the memory's peak in a copy: 4.3 of 4.8 TB/s measured on an H200")
    update_bandwidth: float = _assumed(0.0, "bytes/s", "of AdamW; 0: as memory_bandwidth")
    launch_seconds: float = _assumed(5e-6, "s", "from one kernel to the next where kernels are short; assumed")
    link_share: float = _assumed(0.80, "", "of a link that a collective reaches: assumed; nccl-tests shows 0.7-0.9")
    intra_bandwidth: float = _assumed(0.0, "bytes/s", "of one GPU to its node's others; 0: link × link_share")
    inter_bandwidth: float = _assumed(0.0, "bytes/s", "of one node to others; 0: network × link_share")
    memory_usable: float = _assumed(0.92, "", "of the GPU's memory: context, libraries, fragmentation; assumed")
    loader_images_per_second_per_core: float = _assumed(
        788.0, "images/s", "benchmarks, loader: ours, one core, JPEGs of 94 kB"
    )
    undecoded_images_per_second_per_core: float = _assumed(
        8000.0, "images/s", "loader.decoder=gpu: what a worker does beside decoding and resizing, 120 of 1,120 µs"
    )
    gpu_images_per_second: float = _assumed(
        3000.0, "images/s", "one GPU decodes with loader.decoder=gpu: assumed (bench gpu, decode, measures it)"
    )
    image_bytes: float = _assumed(110e3, "bytes", "an ImageNet-1k JPEG in the mean (benchmarks, loader)")
    loader_cv: float = _assumed(0.10, "", "deviation of a batch's loading time over its mean; assumed")
    straggler_cv: float = _assumed(0.01, "", "deviation of a rank's time for a step over its mean; assumed")
    tokenizer_macs: float = _assumed(0.0, "", "multiply-adds of a view's online tokens; 0: own dVAE. DALL-E: 26.06e9")
    failures_per_gpu_day: float = _assumed(4.7e-4, "1/day", "419 in 54 days on 16,384 H100 (arXiv 2407.21783, 3.3.4)")
    save_seconds: float = _assumed(2.0, "s", "of a checkpoint beside its bytes: files, flushing, waiting; assumed")
    restart_seconds: float = _assumed(300.0, "s", "noticing (60 s), starting, loading weights; assumed")
    node_read: float = _assumed(0.0, "bytes/s", "of storage, by one node; 0: the storage's")
    node_write: float = _assumed(0.0, "bytes/s", "of storage, by one node; 0: the storage's")
    host_copy: float = _assumed(25e9, "bytes/s", "one GPU to host memory, PCIe 4.0 x16; assumed")
    node_power: float = _assumed(1.82, "", "a node's power over its GPUs': 10.2 kW of 8 × 700 W, DGX H100 data sheet")
    memory_bytes: float = _assumed(0.0, "bytes", "peak memory that a run measured; shown beside the prediction")
    origins: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[tuple[str, float, str, str]]:
        """Name, value, unit and origin of each."""
        found = []
        for item in dataclasses.fields(self):
            if item.name != "origins":
                value, unit = getattr(self, item.name), item.metadata["unit"]
                found.append((item.name, value, unit, self.origins.get(item.name, item.metadata["source"])))
        return found


_MORE_THAN_NOTHING = ("loader_images_per_second_per_core", "image_bytes", "host_copy", "node_power")
NAMES = tuple(item.name for item in dataclasses.fields(Assumptions) if item.name != "origins")


def load_assumptions(paths: list[str], overrides: list[str], flops_per_image: float) -> Assumptions:
    """Defaults, over them what each of `paths` measured, over them `name=number` words.

    A path is a run folder, a results file of benchmarks (kernels, train, loader), the report of `doctor --json`, or a
    JSON object of names and numbers. flops_per_image: of the config. Raises ConfigError with one line.
    """
    values: dict[str, float] = {}
    origins: dict[str, str] = {}
    for path in paths:
        found = _measured(Path(path), flops_per_image)
        values |= found
        origins |= dict.fromkeys(found, f"measured: {path}")
    for word in overrides:
        name, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"--assume {word!r}: write name=number, for example straggler_cv=0.05")
        values[name] = _number(name, text, "--assume")
        origins[name] = "given"
    for name, number in values.items():
        share = name.endswith("_share") or name == "memory_usable"
        if share and not 0 < number <= 1:
            raise ConfigError(f"{origins[name]}: {name} is {number:g}; a share lies in (0, 1]")
        if number < 0 or (number == 0 and name in _MORE_THAN_NOTHING):
            raise ConfigError(f"{origins[name]}: {name} is {number:g}; it must be more than 0")
    return Assumptions(**values, origins=origins)


def _number(name: str, value: object, where: str) -> float:
    if name not in NAMES:
        raise ConfigError(f"{where}: there is no assumption {shown(name)}; it takes {', '.join(NAMES)}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{where}: {name} is {shown(value)}; it must be a number") from None
    if isinstance(value, bool) or not (number == 0 or 1 / _LARGEST <= abs(number) <= _LARGEST):
        raise ConfigError(
            f"{where}: {name} is {shown(value)}; it must be a finite number, 0 or from {1 / _LARGEST:g} to {_LARGEST:g}"
        )
    return number


def _measured(path: Path, flops_per_image: float) -> dict[str, float]:
    """What a folder or a file says, by the names of Assumptions."""
    try:
        if path.is_dir():
            return _of_run(path, flops_per_image)
        return _of_file(read_object(path), path, flops_per_image)
    except FileNotFoundError:
        raise ConfigError(f"--from {path} does not exist; give a run folder, a results file or a JSON file") from None
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"--from {path} cannot be read as JSON: {' '.join(str(error).split())}") from error
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        said = f"{type(error).__name__}: {shown(str(error))}"
        raise ConfigError(f"--from {path} is not what it seems ({said}); give a file as it was written") from error


def _of_file(content: dict, path: Path, flops_per_image: float) -> dict[str, float]:
    if "rows" in content and "name" in content:
        return _of_benchmark(content, path, flops_per_image)
    if "findings" in content and "verdict" in content:
        return _of_doctor(content, path)
    given = content.get("measured", content)
    if not isinstance(given, dict):
        raise ConfigError(f"--from {path}: measured must be an object of names and numbers")
    return {name: _number(name, value, f"--from {path}") for name, value in given.items()}


def _of_run(run: Path, flops_per_image: float) -> dict[str, float]:
    """The second half of a run's metrics.jsonl: images a second over all GPUs, peak memory of the first."""
    if not (run / "metrics.jsonl").exists():
        raise ConfigError(f"--from {run} holds no metrics.jsonl; give the folder that train.run names")
    lines = read_lines(run / "metrics.jsonl", run, metric_line).lines
    started = max((place for place, line in enumerate(lines) if line.get("kind") == "start"), default=0)
    trained = [line for line in lines[started:] if line.get("kind") == "train" and "images_per_second" in line]
    if not trained:
        raise ConfigError(f"--from {run}: metrics.jsonl has no training step yet")
    world = max(1, count(lines[started], "world", 1))
    steady = median(value(line, "images_per_second") for line in trained[len(trained) // 2 :])
    memory = max(value(line, "memory_bytes") for line in trained)
    found = {"achieved_flops": steady * flops_per_image / world, "memory_bytes": memory}
    return {name: number for name, number in found.items() if number == number}


def _of_benchmark(content: dict, path: Path, flops_per_image: float) -> dict[str, float]:
    """The rows of a results file that measure what is assumed here."""
    name, rows = content["name"], content["rows"]
    notes = " ".join(content.get("notes", []))
    if name == "loader":
        found = [row for row in rows if row.get("path") == "ours" and row.get("runs on", "one core") == "one core"]
        return {"loader_images_per_second_per_core": float(found[0]["images/s"])} if found else {}
    if name == "decode":
        rates = [str(row.get("images/s", "")) for row in rows if str(row.get("decoded by", "")).startswith("nvJPEG")]
        measured = [float(rate.replace(",", "")) for rate in rates if rate[:1].isdigit()]  # "not begun: …"
        return {"gpu_images_per_second": measured[0]} if measured else {}
    if name == "train":
        ours = [row for row in rows if str(row.get("step", "")).startswith("ours") and row["images/s"]]  # "": failed
        speeds = [float(row["images/s"]) * _flops_of(row["model"], flops_per_image) for row in ours]
        if speeds:
            return {"achieved_flops": max(speeds)}
    if name == "kernels" and "copy" in notes and "product" in notes:
        words = notes.replace(",", " ").split()
        copy, product = (float(words[words.index(word) + 1]) * 1e12 for word in ("copy", "product"))
        return {"memory_bandwidth": copy, "matrix_flops": product}
    raise ConfigError(
        f"--from {path}: nothing of benchmark {shown(name)} is an assumption; give kernels, train, loader or decode"
    )


def _of_doctor(content: dict, path: Path) -> dict[str, float]:
    """The report of `doctor --json`: what a host read, and the slowest pairs of ranks."""
    found: dict[str, float] = {}
    for each in content["findings"]:
        check, what, rate = each.get("check"), str(each.get("what", "")), _rate(str(each.get("value", "")))
        if rate and check == "storage":
            found["node_read"] = min(rate, found.get("node_read", rate))
        if rate and check == "network" and "pair between hosts" in what:
            found["inter_bandwidth"] = rate
        if rate and check == "network" and "pair within a host" in what:
            found["intra_bandwidth"] = rate
    if not found:
        raise ConfigError(
            f"--from {path}: doctor measured neither storage nor network; run it on more than one process"
        )
    return found


def _rate(text: str) -> float:
    """Bytes a second of `12.5 GB/s` or `1.2 GiB/s`; 0 for anything else."""
    number, _, unit = text.partition(" ")
    scale = {"GB/s": 1e9, "MB/s": 1e6, "GiB/s": 2.0**30, "MiB/s": 2.0**20, "KiB/s": 2.0**10}.get(unit, 0.0)
    return float(number) * scale if scale else 0.0


def _flops_of(model: str, flops_per_image: float) -> float:
    """Operations an image of the sizes that benchmarks/train measures (docs/recipe.md, "Cost")."""
    return {"base": 108.2e9, "large": 373.1e9}.get(model, flops_per_image)
