"""How ranks share the lanes of an order (docs/formats.md, "The order of samples"), by arithmetic alone.

What `simulate`, `plan`, `doctor` and a starting run say of it.
"""

import math

MUCH = 1.1  # times the set that all nodes together may read without a word


def times_read(lanes: int, ranks: int, ranks_per_node: int) -> float:
    """How many times all nodes together read the set in an epoch.

    Rank r reads the lanes that leave a rest with greatest-common-divisor(lanes, ranks) which moves on by one with the
    rank: a node of consecutive ranks reads as many of these classes as it has ranks, or all.
    """
    classes = math.gcd(lanes, ranks)
    full, rest = divmod(ranks, ranks_per_node)
    return (full * min(ranks_per_node, classes) + min(rest, classes)) / classes


def suiting_lanes(lanes: int, ranks: int, ranks_per_node: int) -> int:
    """`lanes`, where all nodes together read the set about once, else the number to have instead: the smallest of
    ranks · 2^k that is no smaller, which suits twice and half as many ranks, too."""
    if times_read(lanes, ranks, ranks_per_node) <= MUCH:
        return lanes
    while ranks < lanes:
        ranks *= 2
    return ranks


def window_samples(samples: int, chunk: int, window: int, lanes: int, ranks: int, ranks_per_node: int) -> int:
    """Samples, at most, of the chunks that a node keeps for one window of its lanes; a cache holds two of them, the one
    that is read and the next. samples: of the set."""
    classes = math.gcd(lanes, ranks)
    of_a_lane = min(window * chunk, -(-samples // lanes)) + chunk
    return min(samples, lanes // classes * min(ranks_per_node, ranks, classes) * of_a_lane)


def advice(lanes: int, ranks: int, ranks_per_node: int) -> tuple[str, str]:
    """What is read too often, and the setting that cures it; empty where there is nothing to say."""
    suiting = suiting_lanes(lanes, ranks, ranks_per_node)
    if suiting == lanes:
        return "", ""
    times = times_read(lanes, ranks, ranks_per_node)
    what = f"with loader.lanes={lanes} the nodes of {ranks} ranks, {ranks_per_node} a node, together read the set "
    return f"{what}{times:.1f} times an epoch", f"set loader.lanes={suiting} in a run that has not begun"
