"""Count the instructions of the GPU kernels, and what share of the memory's speed they allow.

Without a GPU: the kernels are compiled for compute capability 9.0, and the instructions that a
thread executes are counted in their machine code. With the numbers of multiprocessors, their clock
and the memory's bandwidth of an H100 and an H200, this bounds the share of the floor (each byte
moved once) that a pass can reach, as if everything overlapped. It needs this package with Triton
(``pip install '.[gpu]'``).

    python benchmarks/gpu_instructions.py                    # the table of bfloat16 with SiLU
    python benchmarks/gpu_instructions.py --against COMMIT   # and that of another commit before it
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))

from _sass import SLOW, executed  # noqa: E402

# samples, groups, channels of a group, positions
SHAPES = {
    "UNet 16x320@64x64": (16, 32, 10, 4096),
    "UNet 16x1280@16x16": (16, 32, 40, 256),
    "VAE 1x512@256x256": (1, 32, 16, 65536),
    "video VAE 1x128@20x256x256": (1, 32, 4, 20 * 65536),
    "ResNet-50 32x256@56x56": (32, 32, 8, 3136),
    "ResNet-50 256x64@112x112": (256, 32, 2, 12544),
}
# Bytes a second; both have 132 multiprocessors, with four issue slots a cycle.
CARDS = {"H100": 3.35e12, "H200": 4.8e12}
MULTIPROCESSORS, CLOCK, SLOTS, WARP = 132, 1.98e9, 4, 32
# Launches that touch sums and parts only.
MERGING = ("merge", "sum_rows")


class Pass(NamedTuple):
    """One launch: its instructions for each element, and the seconds of each limit."""

    kernel: str
    instructions: float  # an element
    limits: dict[str, float]
    moved: int  # arrays of x's size that are read or written


def dtypes_of(launch: Any, dtype: str) -> tuple[str, ...]:
    """Return the dtypes of a launch's arrays, of which those of x's size have `dtype`."""
    # Older commits had pointers without a name.
    given = dict.fromkeys(("x", "y", "dy", "dx", ""), dtype) | {"mask": "uint8"}
    return tuple(given.get(name, "float32") for name in launch.arrays)


def passes(shape: Any, program: Any, dtype: str = "bfloat16") -> Iterator[Pass]:
    """Yield the launches of a program that read all elements."""
    from groupnorm.backends.kernels.gpu.build import build

    for launch in program.launches:
        if launch.kernel in MERGING:
            continue
        types = dtypes_of(launch, dtype)
        built, _ = build(launch, types, (True,) * len(types), 90, False)
        counts = executed(built.cubin_path, launch, shape.positions, shape.item_bytes)
        threads = launch.grid[0] * built.threads
        cycles = {"issue": counts["all"] * threads / WARP / SLOTS}
        cycles |= {name: counts[name] * threads / rate for name, rate in SLOW.items()}
        moved = len({"x", "y", "dy", "dx"} & set(launch.arrays))
        yield Pass(
            launch.kernel,
            counts["all"] * threads / shape.elements,
            {name: number / MULTIPROCESSORS / CLOCK for name, number in cycles.items()},
            moved,
        )


def share(shape: Any, found: list[Pass], bandwidth: float) -> float:
    """Return the bound on the share of the floor of a pass, which consists of launches."""
    size = shape.elements * shape.item_bytes
    floor = [p.moved * size / bandwidth for p in found]
    taken = [max(f, *p.limits.values()) for f, p in zip(floor, found, strict=True)]
    return sum(floor) / sum(taken)


def rows() -> Iterator[list[str]]:
    """Yield the rows of the table."""
    from groupnorm.backends.kernels.gpu import program as gpu
    from groupnorm.backends.kernels.grouped_shape import GroupedShape

    options = gpu.KernelOptions(1e-6, "silu", None, True, True)
    for name, numbers in SHAPES.items():
        for order in ("first", "last"):
            shape = GroupedShape(*numbers, order == "first", 2)
            row = [name, order]
            for plan in (gpu.forward, gpu.backward):
                found = list(passes(shape, plan(shape, options)))
                bounds = (f"{100 * share(shape, found, b):.0f}" for b in CARDS.values())
                row.append(" / ".join(bounds))
                row.append(", ".join(f"{p.kernel} {p.instructions:.1f}" for p in found))
            yield row


def print_against(commit: str) -> None:
    """Print the table of another commit's kernels."""
    with tempfile.TemporaryDirectory() as folder:
        command = f"git -C {shlex.quote(str(ROOT))} archive {commit} | tar -x -C {folder}"
        subprocess.run(command, shell=True, check=True)
        print(f"At {commit[:9]}:\n", flush=True)
        environment = {**os.environ, "PYTHONPATH": folder}
        subprocess.run([sys.executable, __file__], cwd=folder, env=environment, check=True)


def commit(text: str) -> str:
    """Return the hash of what git calls a commit by that name."""
    command = ["git", "-C", ROOT, "rev-parse", "--verify", "--quiet", text + "^{commit}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise argparse.ArgumentTypeError(f"{text!r} is no commit of {ROOT}")
    return found.stdout.strip()


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--against", type=commit, metavar="COMMIT", help="print the table of this commit first"
    )
    arguments = parser.parse_args()
    try:
        import triton  # noqa: F401

        import groupnorm  # noqa: F401
    except ImportError as error:
        print(
            f"gpu_instructions.py needs Triton and groupnorm ({error}): pip install '.[gpu]'",
            file=sys.stderr,
        )
        return 2
    if arguments.against:
        print_against(arguments.against)
        print("\nNow:\n")
    cards = " / ".join(CARDS)
    print("bfloat16 with SiLU; bounds in % of the floor, and instructions an element\n")
    print(f"| shape | channels | forward {cards} | | backward {cards} | |")
    print("|---|---|---|---|---|---|")
    for row in rows():
        print("| " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
