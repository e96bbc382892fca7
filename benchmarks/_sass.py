"""Instructions of compiled GPU kernels: parsing what cuobjdump prints, and how often each runs.

No GPU is needed. The kernels branch little: loops over tiles, a last tile that is not full, and a
part that is for values out of range, which is not run otherwise. How often a loop runs follows from
the launch.
"""

import itertools
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["executed", "resources", "spills_in_loops"]

# Instructions that take more than an issue slot: lanes a cycle and multiprocessor (CUDA's
# programming guide, arithmetic throughput, compute capability 9.0).
SLOW = {"MUFU": 16, "SHFL": 32, "LDS": 32, "STS": 32}


@dataclass
class Block:
    """A basic block: its instructions, and the indices of the blocks that may follow."""

    text: list[str]
    next: list[int] = field(default_factory=list)


def _tool(cubin: str, *options: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run(
        [tool, *options, cubin], capture_output=True, text=True, check=True
    ).stdout


def resources(cubin: str) -> dict[str, int]:
    """Return registers, bytes of stack and so on, by cuobjdump's names."""
    text = _tool(cubin, "--dump-resource-usage")
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", text)}


def blocks_of(cubin: str) -> list[Block]:
    """Return the basic blocks of a cubin's kernel, in the order of their addresses."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", _tool(cubin, "-sass"), re.MULTILINE)
    code = [(int(address, 16), text) for address, text in found]
    targets = {}
    for address, text in code:
        branch = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        if branch:
            targets[address] = int(branch[1], 16)
    begins = {code[0][0], *targets.values()}
    for (address, text), (after, _) in itertools.pairwise(code):
        if address in targets or "EXIT" in text or re.search(r"\bRET\b", text):
            begins.add(after)
    begins &= {address for address, _ in code}
    order = sorted(begins)
    index = {address: i for i, address in enumerate(order)}
    blocks: list[Block] = []
    for address, text in code:
        if address in begins:
            blocks.append(Block([]))
        blocks[-1].text.append(text)
        end = targets.get(address)
        if end in index:
            blocks[-1].next.append(index[end])
    for i, block in enumerate(blocks[:-1]):
        last = block.text[-1]
        jumps = re.search(r"\b(BRA|EXIT|RET)\b", last)
        conditional = last.startswith("@") or re.search(r"\bBRA\.?\w*\s+!?U?P\d", last)
        if not jumps or conditional:
            block.next.append(i + 1)
    return _reachable(blocks)


def _reachable(blocks: list[Block]) -> list[Block]:
    """Leave out what nothing leads to: padding, and subroutines for rare operands of divisions."""
    seen, todo = {0}, [0]
    while todo:
        new = set(blocks[todo.pop()].next) - seen
        seen |= new
        todo += new
    number = {old: new for new, old in enumerate(sorted(seen))}
    return [Block(blocks[i].text, [number[j] for j in blocks[i].next]) for i in sorted(seen)]


def _dominators(blocks: list[Block]) -> list[set[int]]:
    """Return, for each block, those that every way to it goes through."""
    before: list[list[int]] = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for j in block.next:
            before[j].append(i)
    everything = set(range(len(blocks)))
    found = [{0}, *(set(everything) for _ in blocks[1:])]
    changed = True
    while changed:
        changed = False
        for i in range(1, len(blocks)):
            reached = [found[j] for j in before[i]]
            new = (set.intersection(*reached) if reached else set()) | {i}
            changed |= new != found[i]
            found[i] = new
    return found


def _loops(blocks: list[Block], dominators: list[set[int]]) -> list[set[int]]:
    """Return the blocks of each natural loop, outer loops before inner ones."""
    found: dict[int, set[int]] = {}
    for i, block in enumerate(blocks):
        for head in set(block.next) & dominators[i]:
            body, todo = found.setdefault(head, {head}), [i]
            while todo:
                j = todo.pop()
                if j not in body:
                    body.add(j)
                    todo += [k for k, b in enumerate(blocks) if j in b.next]
    return sorted(found.values(), key=len, reverse=True)


def _loaded(blocks: list[Block], body: set[int]) -> int:
    """Return the bytes of global memory that the instructions of some blocks read."""
    found = (re.search(r"\bLDG(?:STS)?\.(\S+)", text) for i in body for text in blocks[i].text)
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return sum(
        next((sizes[part] for part in load[1].split(".") if part in sizes), 4)
        for load in found if load
    )  # fmt: skip


def spills_in_loops(cubin: str) -> list[str]:
    """Return the accesses of a thread's own memory in loops."""
    blocks = blocks_of(cubin)
    looped = set().union(*_loops(blocks, _dominators(blocks)))
    return [t for i in looped for t in blocks[i].text if re.search(r"\b(LDL|STL)\b", t)]


def executed(cubin: str, launch: Any, positions: int, item: int) -> dict[str, float]:
    """Return how many instructions a thread executes, all and the `SLOW` ones.

    Parameters
    ----------
    cubin : str
        The path of the compiled kernel.
    launch : Launch
        Of this kernel.
    positions, item : int
        Of the array, and the bytes of an element.
    """
    blocks = blocks_of(cubin)
    dominators = _dominators(blocks)
    loops = _loops(blocks, dominators)
    heads = [min(b) for b in loops if not any(b < o for o in loops)]
    # What only a branch leads to, with two loops after each other, is for values out of range.
    rare: set[int] = set()
    for i, block in enumerate(blocks):
        for entry in block.next if len(block.next) == 2 else ():
            region = {j for j, d in enumerate(dominators) if entry in d}
            ends = any("EXIT" in blocks[j].text[-1] for j in region)
            if i not in region and not ends and sum(h in region for h in heads) > 1:
                rare |= region
    constants, scalars = dict(launch.constants), dict(launch.scalars)
    weights = [0.0 if i in rare else 1.0 for i in range(len(blocks))]
    inner = [b for b in loops if not any(o < b for o in loops) and _loaded(blocks, b)]
    inner = [b for b in inner if not b & rare]
    if inner and "EVEN" in constants:
        rows = min(scalars.get("chunk", positions), positions)
        length, unroll = constants["TILE_POSITIONS"], constants.get("UNROLL", 1)
        lanes = 32 * launch.warps / constants["TILE_CHANNELS"]  # threads for each channel
        read = len({"x", "dy"} & set(launch.arrays))
        at_once = {id(b): _loaded(blocks, b) / item / read * lanes for b in inner}
        main = [b for b in inner if unroll == 1 or at_once[id(b)] > length]
        for body in loops:
            if body & rare:
                continue
            within = sum(b < body for b in main)
            if body in main:
                trips = rows // at_once[id(body)]
            elif body in inner:  # over the tiles that are left of a round
                trips = -(-(rows % (length * unroll)) // length)
            elif within:  # over channels, maybe unrolled
                trips = constants["GROUP_SIZE"] // constants["TILE_CHANNELS"] / within
            else:
                trips = 1
            for i in body:
                weights[i] *= trips
    counts = dict.fromkeys(("all", *SLOW), 0.0)
    for block, weight in zip(blocks, weights, strict=True):
        for text in block.text:
            name = re.sub(r"^@!?U?P\w+\s+", "", text).split(".")[0].split()[0]
            if name == "NOP":
                continue
            counts["all"] += weight
            if name in SLOW:
                counts[name] += weight
    return counts
