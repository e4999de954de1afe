"""Detects what slows or harms a run without ending it: a straggling rank, a starved loader, a loss spike.

The values go to metrics.jsonl; the log names a condition once when it begins. Must not know model, shards or any stage.
"""

import statistics
from collections import deque
from collections.abc import Callable

from beitforge.pipeline.config.settings import Faults

_INTERVALS = 3  # consecutive logged intervals before a rank or a loader is named
_AGAIN = 50  # logged intervals after which a lasting condition is named again
_WINDOW, _LEAST = 50, 10  # logged losses that a loss is compared with, and the minimum number of them
_MAD = 1.4826  # standard deviation of a normal distribution divided by its median absolute deviation


class Monitor:
    """Checks what every rank logged, on rank 0."""

    def __init__(self, faults: Faults, hosts: list[str], say: Callable[[str], None]):
        self.faults, self.hosts, self.say = faults, hosts, say
        self.losses: deque[float] = deque(maxlen=_WINDOW)
        self.lasting: dict[str, int] = {}

    def check(self, step: int, loss: float, forward: list[float], waits: list[float]) -> dict[str, float]:
        """Additional values to log: forward seconds of the median and the slowest rank, the largest share of time spent
        waiting for data, and which ranks these are. Reports anything unusual through `say`.

        forward: seconds of each rank since the last call, without waiting for others. waits: each rank's share of time.
        """
        slowest, hungriest = forward.index(max(forward)), waits.index(max(waits))
        middle = statistics.median_low(forward)
        self._name(
            f"rank {slowest} on {self.hosts[slowest]} is slow: {max(forward) / max(middle, 1e-9):.1f} times the median "
            f"rank's time forward at step {step}",
            f"slow {slowest}",
            bool(self.faults.straggler) and len(forward) > 1 and max(forward) > self.faults.straggler * middle,
            _INTERVALS,
        )
        self._name(
            f"rank {hungriest} on {self.hosts[hungriest]} waits for data {max(waits):.0%} of the time at step {step}: "
            f"more loader.workers, faster storage, or a smaller view",
            f"starved {hungriest}",
            bool(self.faults.starved) and max(waits) > self.faults.starved,
            _INTERVALS,
        )
        jump = self._jump(loss)
        self._name(
            f"loss {loss:.4g} at step {step}: {jump:.0f} deviations above the last {len(self.losses)} logged",
            "spike",
            bool(self.faults.spike) and jump > self.faults.spike,
            1,
        )
        self.losses.append(loss)
        found = {"forward_seconds": middle, "forward_seconds_slowest": max(forward), "slowest_rank": float(slowest)}
        return {**found, "data_wait_worst": max(waits), "hungriest_rank": float(hungriest), "loss_jump": jump}

    def _jump(self, loss: float) -> float:
        """How many deviations a loss is above the median of those before; 0 while there are too few."""
        if len(self.losses) < _LEAST:
            return 0.0
        middle = statistics.median(self.losses)
        spread = _MAD * statistics.median(abs(value - middle) for value in self.losses)
        return (loss - middle) / max(spread, 1e-3 * abs(middle), 1e-9)

    def _name(self, line: str, what: str, holds: bool, after: int) -> None:
        """Say it when it has held `after` times in a row, and again from time to time."""
        kind = what.split()[0]
        for other in [name for name in self.lasting if name.split()[0] == kind and (name != what or not holds)]:
            del self.lasting[other]
        if holds:
            count = self.lasting[what] = self.lasting.get(what, 0) + 1
            if count == after or (count > after and (count - after) % _AGAIN == 0):
                self.say(line)
