"""`doctor CONFIG`: every rank looks at its host, data, device and network before a training does; one verdict.

Each rank's own checks need no other rank; their findings go to the first through a store (pipeline.doctor.collect),
which names whoever does not report in time. Only when all have, they meet in a process group for the network and a dry
step.
"""

import contextlib
import datetime
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn

from beitforge.kernels.faults import faults
from beitforge.pipeline.cluster.environment import RankInfo, rank_info, rendezvous_variables
from beitforge.pipeline.config.derived import micro_batch
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.console import program_name
from beitforge.pipeline.data import pretraining
from beitforge.pipeline.data.pretraining import DataSource
from beitforge.pipeline.distributed.device import own_device
from beitforge.pipeline.distributed.process_group import start_world
from beitforge.pipeline.doctor import data, network
from beitforge.pipeline.doctor import device as checks_device
from beitforge.pipeline.doctor import host as checks_host
from beitforge.pipeline.doctor import kernels as checks_kernels
from beitforge.pipeline.doctor.collect import FAR, LOCAL, Collector, PortInUse, RankReporter, connect_again
from beitforge.pipeline.doctor.findings import (
    END,
    LINES,
    MARK,
    OK,
    STOP,
    WARNING,
    Finding,
    Local,
    to_json,
    to_line,
    to_text,
    worst,
)
from beitforge.pipeline.doctor.host import Arrivals, started_by_srun
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.model.float8 import use_float8
from beitforge.pipeline.plan.costs import num_parameters
from beitforge.pipeline.plan.estimate import checkpoint_size, sharding_of
from beitforge.shards.errors import ShardError

_CLOCK_UNSURE = 0.7
_LEFT_SECONDS = 600.0
NOTHING, NETWORK, ALL = "nothing", "network", "all"  # what is done together


@dataclass
class _Me:
    """One rank at its checks. `until`: of time.monotonic(), when its own must be over."""

    config: Config
    place: RankInfo
    host: str
    seconds: float
    arrivals: Arrivals
    post: RankReporter
    local: Local
    source: DataSource | None = None
    module: nn.Module | None = None
    rates: dict[str, float] = field(default_factory=dict)

    def share(self, of: float) -> float:
        return self.seconds * of


def run(config: Config, seconds: float, json: bool, arrivals: Arrivals) -> int:
    """Look, and on the first rank say what was found; the exit code, 0, 1 or 2. `seconds`: for everything."""
    started = time.monotonic()
    place = rank_info(os.environ)
    meet = rendezvous_variables(os.environ)
    address, port = meet["MASTER_ADDR"], int(meet["MASTER_PORT"])
    say = _Said(started, json)
    local = Local(checks_host.host_label(os.environ, place), place.rank)
    try:
        post = RankReporter(place, local.host, address, port, started + seconds, say.exit_code)
    except PortInUse:
        checks_host.port_taken(port, checks_host.port_in_use(port), local)
        return say.report(local.found)
    except RuntimeError as error:
        print(f"error: rank {place.rank} on {local.host} cannot reach {address}:{port}: {error}", file=sys.stderr)
        return say.exit_code(2)
    me = _Me(config, place, local.host, seconds, arrivals, post, local)
    token = Path(config.train.run) / f".doctor-{uuid.uuid4().hex[:12]}"
    if place.rank == 0:
        _leave(token)
        post.store.set("token", token.name)
        listener = Collector(
            connect_again(place, address, port, started + seconds),
            checks_host.hosts_by_rank(os.environ, place.size),
            started + 0.45 * seconds,
            started + 0.7 * seconds,
        )
        listening = threading.Thread(target=_listen, args=(me, listener, say, token), daemon=True, name="listener")
        listening.start()
    _alone(me)
    _together(me)
    # the thread that listens, or the one that shows signs of life, ends this process
    if place.rank == 0:
        listening.join()
    post.wait()
    return say.exit_code(2)


@dataclass(frozen=True)
class _Said:
    """How the report leaves this process: as text, JSON, or line by line for the launcher, which then decides."""

    started: float
    json: bool

    def exit_code(self, code: int) -> int:
        return 0 if LINES in os.environ else code

    def report(self, found: list[Finding]) -> int:
        seconds = time.monotonic() - self.started
        if LINES in os.environ:
            print("\n".join([*map(to_line, found), MARK + END]), flush=True)
        else:
            print(to_json(found, seconds) if self.json else to_text(found, seconds), flush=True)
        return self.exit_code(worst(found))


def _leave(token: Path) -> None:
    """A file that every host must see in the run folder. What hinders it, the check of the disk says."""
    with contextlib.suppress(OSError):
        token.parent.mkdir(parents=True, exist_ok=True)
        for left in token.parent.glob(".doctor-*"):  # by one that was killed
            if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                left.unlink()
        token.touch()


def _alone(me: _Me) -> None:
    """What needs no other rank: of the host by its first rank, of the device by each."""
    device = own_device(me.place)
    first = me.place.local_rank == 0
    checks: list[tuple[str, Callable[[], None]]] = [("signals", lambda: _signals(me))]
    if first:
        checks += [("host", lambda: _host(me, device)), ("data", lambda: _data(me))]
    else:
        checks += [("opening the shard sets", lambda: _open(me))]
    checks += [
        ("device", lambda: checks_device.health(me.place, device, me.local)),
        ("kernels", lambda: checks_kernels.kernels(me.config, device, me.local)),
        ("memory", lambda: _memory(me, device, first)),
    ]
    if first:
        checks += [("storage", lambda: _storage(me))]
    for name, check in [*checks, ("loader", lambda: _loader(me))]:
        me.post.set_phase(name)
        _guarded(me.local, name, check)
    content = {"found": [asdict(finding) for finding in me.local.found], "signals": me.arrivals.count}
    if first:
        me.post.set_phase("facts")
        content["facts"] = checks_host.facts(me.config)
    me.post.send(LOCAL, content)
    me.local.found.clear()


def _guarded(local: Local, name: str, check: Callable[[], None]) -> None:
    try:
        check()
    except faults() as error:  # whatever a check meets is a finding
        line = checks_kernels.line_of(error)
        local.add(STOP, name if name != "data" else "images", line, "fix this and run doctor again")


def _signals(me: _Me) -> None:
    checks_host.own_signals(me.arrivals, os.environ, me.local)


def _host(me: _Me, device: torch.device) -> None:
    several = me.place.size > me.place.local_size
    checks_host.own_address(several, device.type == "cpu", os.environ, me.local)
    checks_host.shared_memory(me.place.local_size, device.type == "cuda", me.local)
    checks_host.limits(os.environ, me.local)
    run = Path(me.config.train.run)
    token = run / me.post.wait_for("token")
    if several and not (run.is_dir() and token.name in os.listdir(run)):
        cure = "put train.run on a file system that all hosts share, at the same path"
        what = f"{run} here is not the folder that the first rank's host has there"
        me.local.add(STOP, "run folder", what, cure, whole_host=True)


def _data(me: _Me) -> None:
    me.source = data.sets(me.config, me.share(0.12), me.local)
    if me.source is not None:
        data.check_lanes(me.config, me.source, me.place, me.local)


def _open(me: _Me) -> None:
    """Faults of the sets are named once a host, by its first rank."""
    try:
        me.source = pretraining.pretraining(me.config)
    except (ShardError, ConfigError):
        me.source = None


def _micro(me: _Me) -> int:
    train = me.config.train
    return micro_batch(train.global_batch, train.micro_batch, me.place.size, "train.global_batch")


def _memory(me: _Me, device: torch.device, first: bool) -> None:
    """Build the model; whether a micro batch will fit, and how much a checkpoint takes."""
    beit = Beit(me.config.model, me.config.tokenizer.vocabulary, me.config.data.seed)
    beit.checkpointing = me.config.train.activation_checkpointing
    if me.config.train.precision == "fp8":
        use_float8(beit, device)
    if first:
        sharding = sharding_of(me.config, me.place.size, me.config.train.zero_stage, 1)
        data.check_disk_space(me.config, checkpoint_size(sharding), me.local)
    micro, cost = _micro(me), checks_device.cost(me.config, beit, device, me.place.size)
    free = checks_device.free_memory(me.place, device)
    per_process = me.config.train.global_batch // me.place.size
    if not checks_device.fits(me.config, cost, micro, per_process, free, me.local):
        return
    if cost.image_seconds * micro * 3 > me.share(0.3):
        what = f"a step of {micro} images would take {cost.image_seconds * micro:.0f} s here: left out"
        me.local.add(WARNING, "step", what, "run doctor on the machine that trains, or with more --seconds")
        return
    me.module = beit


def _well(me: _Me, *checks: str) -> bool:
    return not any(finding.level == STOP and finding.check in checks for finding in me.local.found)


def _storage(me: _Me) -> None:
    if me.source is not None and _well(me, "images"):
        me.rates["storage"] = data.measure_read(me.config, me.source, me.share(0.04), me.local)


def _loader(me: _Me) -> None:
    if me.source is not None and _well(me, "images", "tokens", "digests", "memory", "storage"):
        me.rates["loader"] = data.measure_loader(me.config, me.source, _micro(me), me.place, me.share(0.06))


def _together(me: _Me) -> None:
    """What all do at once, after every rank has reported."""
    go = me.post.wait_for("go")
    if go == NOTHING:
        return
    found: dict = {}
    name = ""

    def at(phase: str) -> None:
        nonlocal name
        name = phase
        me.post.set_phase(phase)

    try:
        if started_by_srun(os.environ):
            at("signals through SLURM")
            _slurm_signals(me)
        at("joining the process group")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        limit = datetime.timedelta(seconds=me.seconds)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("doctor", me.post.store),
            rank=me.place.rank,
            world_size=me.place.size,
            timeout=limit,
        )
        world = start_world(me.seconds)
        hosts = me.post.wait_for("hosts").split(",")
        if world.size > 1:
            found["speeds"] = asdict(network.measure(world, hosts, me.share(0.1), at))
        if go == ALL and me.module is not None:
            seconds, images = checks_device.dry_step(me.config, world, me.module, _micro(me), me.local, at)
            found["step"] = seconds
            found["numbers"] = num_parameters(me.config.model, me.config.tokenizer.vocabulary)
            _feeding(me, images / seconds)
    except faults() as error:
        line = checks_kernels.line_of(error)
        check = "step" if "step" in name or "DeepSpeed" in name else "network"
        me.local.add(STOP, check, f"{name}: {line}", "see which other rank or host is named here, and its output")
    me.post.set_phase("done")
    me.post.send(FAR, {**found, "found": [asdict(finding) for finding in me.local.found]})


def _slurm_signals(me: _Me) -> None:
    """SLURM sends SIGUSR1 to the tasks of this step, as it does before the time limit."""
    before = me.arrivals.count
    me.post.store.add("listening", 1)
    if me.place.rank == 0:
        until = time.monotonic() + 5
        while me.post.store.add("listening", 0) < me.place.size and time.monotonic() < until:
            time.sleep(0.05)
        me.post.store.set("signalled", checks_host.signal_step(os.environ))
    hindered = me.post.wait_for("signalled")
    if hindered:
        me.local.add(OK, "signals", f"not tried through SLURM: {hindered}")
    elif me.arrivals.wait(before + 1, 5.0):
        me.local.add(OK, "signals", "SIGUSR1 arrives by SLURM")
    else:
        cure = f"let srun start python itself, as the script of `{program_name()} slurm` does; see ProctrackType"
        me.local.add(STOP, "signals", "SIGUSR1 sent by SLURM to this step does not arrive at this rank", cure)


def _feeding(me: _Me, eaten: float) -> None:
    """What the loader gives against what the model eats, images a second of this rank; and the storage for its host."""
    given, stored = me.rates.get("loader"), me.rates.get("storage")
    if given is None:
        return
    workers, cores = me.config.loader.workers, checks_device.cores(me.place)
    what = f"the loader gives {given:.0f} images/s, the model eats {eaten:.0f}, with {workers} workers"
    if given >= eaten:
        me.local.add(OK, "loader", what, value=f"{given:.0f} images/s")
    else:
        cure = f"more loader.workers ({cores} cores a rank here), `pip install simplejpeg`, or smaller images"
        what += f": it would wait for data {1 - given / eaten:.0%} of the time"
        me.local.add(WARNING, "loader", what, f"{cure} (pack --short-side)", value=f"{given:.0f} images/s")
    if stored and stored < eaten * me.place.local_size:
        cure = "nearer or faster storage, a cache on the node (data.cache), or smaller images (pack --short-side)"
        wanted = eaten * me.place.local_size
        what = f"reads {stored:.0f} images/s; the {me.place.local_size} ranks here eat {wanted:.0f}"
        me.local.add(WARNING, "storage", what, cure, whole_host=True)


def _listen(me: _Me, listener: Collector, say: _Said, token: Path) -> NoReturn:
    """On the first rank, beside its own checks: gather, judge, report, and end all processes."""
    found = _gathered(me, listener)
    with contextlib.suppress(OSError):
        token.unlink()
    code = say.report(found)
    sys.stdout.flush()
    listener.release_ranks(worst(found), {finding.rank for finding in found if finding.check == "rank"})
    os._exit(code)


def _gathered(me: _Me, listener: Collector) -> list[Finding]:
    """Everybody's findings, and what follows from all of them together."""
    store = listener.store
    lost = listener.gather(LOCAL)
    found = [*_sent(listener, LOCAL), *lost, *_compared(listener)]
    unable = any(f.level == STOP and f.check in ("host name", "versions") for f in found)
    fits = not any(f.level == STOP and f.check in ("memory", "kernels") for f in found)
    left_out = any(f.check == "step" for f in found)
    go = NOTHING if lost or unable else ALL if fits and not left_out else NETWORK
    hosts = listener.hosts()
    store.set("hosts", ",".join(hosts))
    store.set("go", go)
    if go == NOTHING:
        return found
    listener.until = me.post.until
    found += listener.gather(FAR)
    found += _sent(listener, FAR)
    parts = [rank.parts.get(FAR, {}) for rank in listener.ranks]
    if all("speeds" in part for part in parts):
        speeds = [_speeds(part["speeds"]) for part in parts]
        found += network.assess(speeds, hosts)
        if all("step" in part for part in parts):
            item = 4 if me.config.train.precision == "fp32" else 2
            step, size = max(part["step"] for part in parts), float(parts[0]["numbers"] * item)
            accumulation = me.config.train.global_batch // (_micro(me) * me.place.size)
            stage = me.config.train.zero_stage
            found.append(network.share_of_step(speeds, hosts, size, stage, accumulation, step))
    return found


def _sent(listener: Collector, part: str) -> list[Finding]:
    return [Finding(**each) for rank in listener.ranks for each in rank.parts.get(part, {}).get("found", [])]


def _compared(listener: Collector) -> list[Finding]:
    """What must be the same on every host, and their clocks."""
    facts, offsets = {}, {}
    for rank in listener.ranks:
        if "facts" in rank.parts.get(LOCAL, {}):
            facts[rank.host] = rank.parts[LOCAL]["facts"]
            offsets[rank.host] = (rank.ahead - listener.ranks[0].ahead, _CLOCK_UNSURE)
    return [*checks_host.compare_hosts(facts), *checks_host.clocks(offsets)]


def _speeds(content: dict) -> network.Speeds:
    pairs = [network.Pair(**pair) for pair in content["pairs"]]
    return network.Speeds(content["reduce"], content["gather"], pairs)
