"""Which block sizes the fused kernels run with, by chip, head size and number of positions. Knows no tensor."""

from dataclasses import dataclass

_HELD = 272  # columns of the bias gradient that a block of 64 queries can hold in registers


@dataclass(frozen=True)
class Blocks:
    """One kernel's tiles: `rows` resident, `columns` going by, `stages` of them fetched ahead, in `warps` warps."""

    rows: int
    columns: int
    stages: int
    warps: int = 4

    def split(self, positions: int) -> tuple[int, int]:
        """How many whole blocks of columns there are, and the width of the last, padded one (0: none)."""
        full, rest = divmod(positions, self.columns)
        return full, padded(rest) if rest else 0

    def size(self, positions: int) -> int:
        """Numbers in all tiles of one head."""
        full, rest = self.split(positions)
        return -(-positions // self.rows) * self.rows * (full * self.columns + rest)


@dataclass(frozen=True)
class Plan:
    """Blocks of the kernels. `held`: the bias gradient is summed in the query kernel, else by a kernel of its own."""

    forward: Blocks
    queries: Blocks
    keys_values: Blocks
    held: bool


def padded(size: int) -> int:
    """The next power of two that the matrix unit takes: at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def choose(capability: tuple[int, int], positions: int, head_size: int, float32: bool) -> Plan:
    """The plan for a chip: compute capability of CUDA, (0, 0) for any other."""
    if float32:  # no matrix unit takes it whole: products by the ordinary one, whose operands fill the registers
        small = Blocks(16, 32, 1)
        return Plan(small, small, small, held=False)
    if padded(head_size) > 64:
        # what the registers of each chip hold with the fewest spills (`compiled`)
        small = Blocks(32, 32, 2) if capability[0] == 8 else Blocks(64, 32, 2, warps=8 if capability[0] >= 10 else 4)
        return Plan(small, small, small, held=False)
    held = positions <= _HELD
    return Plan(Blocks(64, 64, 2), Blocks(64, 32, 3 if held else 2), Blocks(64, 64, 2), held)
