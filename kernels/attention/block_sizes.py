"""Which block sizes the fused kernels run with, by chip, head size and number of positions. Knows no tensor."""

from dataclasses import dataclass

_HELD = 272  # columns of the bias gradient that a block of 64 queries can hold in registers


@dataclass(frozen=True)
class Blocks:
    """One kernel's tiles: `rows` resident, `columns` going by in `stages` buffers, in `warps` warps."""

    rows: int
    columns: int
    stages: int
    warps: int = 4

    def split(self, positions: int) -> tuple[int, int]:
        """How many whole blocks of columns there are, and the width of the last, padded one (0: none)."""
        full, rest = divmod(positions, self.columns)
        return full, padded(rest) if rest else 0

    def padded(self, positions: int) -> tuple[int, int]:
        """Rows and columns of all tiles of one head together."""
        full, rest = self.split(positions)
        return -(-positions // self.rows) * self.rows, full * self.columns + rest

    def size(self, positions: int) -> int:
        """Numbers in all tiles of one head."""
        rows, columns = self.padded(positions)
        return rows * columns


@dataclass(frozen=True)
class Plan:
    """Blocks of the kernels. `held`: the bias gradient is summed in the query kernel, else by a kernel of its own.

    stored: those of the second design's query kernel (kernels.attention.stored); None: the first design runs.
    """

    forward: Blocks
    queries: Blocks
    keys_values: Blocks
    held: bool
    stored: Blocks | None = None


def padded(size: int) -> int:
    """The next power of two that the matrix unit takes: at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def choose(capability: tuple[int, int], positions: int, head_size: int, float32: bool, store: bool = False) -> Plan:
    """The plan for a chip: compute capability of CUDA, (0, 0) for any other. store: by the second design.

    Narrow blocks of columns leave registers for more programs on a multiprocessor. With three stages the copies of the
    next block are under way while a program waits for this one's; with two, Triton waits right behind its own copies.
    """
    held = positions <= _HELD and not float32 and padded(head_size) <= 64
    if float32:  # no matrix unit takes it whole: products by the ordinary one, whose operands fill the registers
        small = Blocks(16, 32, 1)
        return Plan(small, small, small, held, small if store else None)
    nvidia, wide = capability[0] > 0, capability[0] in (9, 10)  # wide: products read operands from shared memory
    stages = 3 if nvidia else 2  # AMD: the next block waits in registers, and shared memory is small
    if padded(head_size) > 64:
        small = Blocks(64 if wide or not nvidia else 32, 32, stages, warps=8 if capability[0] == 10 else 4)
        return Plan(small, small, small, held, Blocks(64, 32, stages) if store else None)
    small = Blocks(64, 32, stages)
    return Plan(small, small, small, held, Blocks(64, 64, stages) if store else None)
