"""Two ranks that do something wrong and write the outcome, for `distributed/test_failures`.

Run as ``python -m tests.programs.failing_ranks torch FOLDER SCENARIO...``, which starts both ranks
for each scenario in turn, or as ``mpiexec -n 2 python -m mpi4py -m tests.programs.failing_ranks mpi
FOLDER SCENARIO``, with ``-n 4`` for a grid. In FOLDER/SCENARIO, ``0.json`` contains the outcome of
rank 0, and ``0.well`` exists if rank 0 reached the point where the scenario is meant to fail.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from groupnorm import bind_axis, group_norm, group_norm_vjp, group_statistics

RANKS = 2
NUM_GROUPS = 4
# How long one gloo rank waits for the other; MPI waits forever.
PATIENCE = datetime.timedelta(seconds=20)
SHORT_PATIENCE = datetime.timedelta(seconds=3)
# Every rank's time limit, even if no process is left to kill it.
SECONDS = 40


class Torch:
    """Two ranks of gloo."""

    def __init__(self, folder: Path, rank: int) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        self.torch, self.dist = torch, dist
        self.folder, self.rank = folder, rank
        meet = f"file://{folder}/meet"
        dist.init_process_group(
            "gloo", init_method=meet, rank=rank, world_size=RANKS, timeout=PATIENCE
        )

    def array(self, values: np.ndarray):
        return self.torch.from_numpy(values)

    def group(self, patience=PATIENCE):
        """Return a group of all ranks over which no signature has been checked yet."""
        return self.dist.new_group(timeout=patience)

    def backward(self, group) -> float:
        x = self.array(values()).requires_grad_()
        y = group_norm(x, num_groups=NUM_GROUPS, axis_name=group)
        report_ready(self)
        (gradient,) = self.torch.autograd.grad(y, x, y.detach() ** 2)
        return float(gradient.abs().max())

    def foreign(self) -> dict:
        """Return communicators that this rank cannot use."""
        mesh = self.dist.device_mesh
        groups = [self.dist.new_group([rank]) for rank in range(RANKS)]
        meshes = [mesh.DeviceMesh("cpu", [rank]) for rank in range(RANKS)]
        square = mesh.init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("rows", "columns"))
        return {
            "not a member": groups[1 - self.rank],
            "not in the mesh": meshes[1 - self.rank],
            "mesh of two dimensions": square,
        }


class Mpi:
    """Two ranks of MPI."""

    def __init__(self, folder: Path) -> None:
        from mpi4py import MPI

        self.mpi = MPI
        self.folder, self.rank = folder, MPI.COMM_WORLD.rank

    def array(self, values: np.ndarray):
        return values

    def group(self):
        return self.mpi.COMM_WORLD.Dup()

    def grid(self) -> tuple:
        """Return communicators along the rows and along the columns of a 2 x 2 grid."""
        world = self.mpi.COMM_WORLD
        return world.Split(self.rank % 2, self.rank), world.Split(self.rank // 2, self.rank)

    def foreign(self) -> dict:
        world, mpi = self.mpi.COMM_WORLD, self.mpi
        # Each rank is excluded from one of these.
        without = [world.Split(mpi.UNDEFINED if self.rank == rank else 0) for rank in range(RANKS)]
        alone = world.Split(self.rank)
        return {
            "not a member": without[self.rank],
            "COMM_NULL": mpi.COMM_NULL,
            "intercommunicator": alone.Create_intercomm(0, world, 1 - self.rank),
        }


def values(batch: int = 2, channels: int = 8) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(batch, 5, channels)).astype(np.float32)


def largest(engine, axis_name, *, batch=2, dtype="float32", num_groups=NUM_GROUPS, **keywords):
    """Return one value of this rank's result."""
    x = engine.array(values(batch).astype(dtype))
    y = group_norm(x, num_groups=num_groups, axis_name=axis_name, **keywords)
    return float(abs(y).max())


def caught(function) -> dict:
    try:
        return {"returned": function()}
    except Exception as error:
        return {
            "types": [kind.__name__ for kind in type(error).__mro__],
            "message": str(error),
        }


# Errors raised on all ranks, before or by the first exchange --------------------------------------


def orderly(engine) -> dict:
    """Run all scenarios that leave the engine usable, which is checked too."""
    out = {}

    def run(name, function, group):
        out[name] = caught(lambda: function(group))
        # On the same communicator, if it is one: the failure must leave no state behind.
        out[f"{name}, afterwards"] = caught(lambda: largest(engine, group))

    for name, keywords in differing(engine.rank).items():
        run(name, lambda group, k=keywords: largest(engine, group, **k), engine.group())
    x = engine.array(values(2 - engine.rank))
    for function in (group_norm_vjp, group_statistics):
        keywords = {"num_groups": NUM_GROUPS}
        run(
            function.__name__,
            lambda group, f=function, k=keywords: str(f(x, axis_name=group, **k)),
            engine.group(),
        )
    out |= unusable(engine)
    return out


def differing(rank: int) -> dict:
    """Return keywords that are wrong on both ranks, or on rank 1 only."""

    def on_1(name, value, other=None):
        return {name: value} if rank == 1 else {} if other is None else {name: other}

    return {
        "index groups differ": {"axis_index_groups": [[0], [1]] if rank else [[0, 1]]},
        "index groups on one rank": on_1("axis_index_groups", [[0, 1]]),
        "a rank left out": {"axis_index_groups": [[0]]},
        "a rank left out by one": on_1("axis_index_groups", [[0]], [[0, 1]]),
        "too many": {"axis_index_groups": [[0, 1], [2]]},
        "too many on one": on_1("axis_index_groups", [[0, 1, 2]], [[0, 1]]),
        "other batch": on_1("batch", 1),
        "other num_groups": on_1("num_groups", 2),
        "other rank": on_1("reduction_axes", (2,)),
        "other dtype": on_1("dtype", "float64"),
        "other dtype of scale": on_1("scale", np.ones(8, np.float64), np.ones(8, np.float32)),
    }


def unusable(engine) -> dict:
    group = engine.group()
    out = {"unbound": caught(lambda: largest(engine, "rows"))}
    with bind_axis(columns=group):
        out["unbound, another bound"] = caught(lambda: largest(engine, "rows"))
        out["unbound in a tuple"] = caught(lambda: largest(engine, ("columns", "rows")))
    with bind_axis(rows=group):
        largest(engine, "rows")
    out["unbound again"] = caught(lambda: largest(engine, "rows"))
    out["no communicator"] = caught(lambda: largest(engine, object()))
    out["nothing"] = caught(lambda: largest(engine, ()))
    # Ranks would be counted more than once.
    out["the same twice"] = caught(lambda: largest(engine, (group, group)))
    out["all of them twice"] = caught(lambda: largest(engine, (engine.group(), engine.group())))
    for name, communicator in engine.foreign().items():
        out[name] = caught(lambda c=communicator: largest(engine, c))
        with bind_axis(foreign=communicator):
            out[f"{name}, by name"] = caught(lambda: largest(engine, "foreign"))
        out[f"{name}, in a tuple"] = caught(lambda c=communicator: largest(engine, (group, c)))
    out["afterwards"] = caught(lambda: largest(engine, group))
    return out


def in_a_grid(engine) -> dict:
    """Let one of four ranks differ; not all others share a communicator with it."""
    out = {}
    for name, wrong, keywords in (
        ("other batch", 3, {"batch": 1}),
        ("other dtype", 0, {"dtype": "float64"}),
        ("index groups", 2, {"axis_index_groups": [[0, 1], [2, 3]]}),
    ):
        grid = engine.grid()
        keywords = keywords if engine.rank == wrong else {}
        out[name] = caught(lambda g=grid, k=keywords: largest(engine, g, **k))
        out[f"{name}, afterwards"] = caught(lambda g=grid: largest(engine, g))
    # One of the communicators by itself has checked this signature already.
    rows, columns = engine.grid()
    largest(engine, rows, batch=1)
    keywords = {} if engine.rank == 1 else {"batch": 1}
    out["one is known"] = caught(lambda: largest(engine, (rows, columns), **keywords))
    # Not a grid: every rank would be counted twice.
    out["no grid"] = caught(lambda: largest(engine, (rows, engine.group())))
    return out


# Failures that no rank survives -------------------------------------------------------------------


def report_ready(engine) -> None:
    (engine.folder / f"{engine.rank}.well").touch()


def later(engine, *known: dict, **keywords) -> float:
    """Call with different arguments after their shapes are known."""
    group = engine.group()
    for one in ({}, *known):
        largest(engine, group, **one)
    report_ready(engine)
    return largest(engine, group, **(keywords if engine.rank else {}))


def dies(engine) -> float:
    group = engine.group()
    largest(engine, group)
    report_ready(engine)
    if engine.rank:
        os._exit(3)
    return largest(engine, group)


def dies_before_backward(engine) -> float:
    if engine.rank == 0:
        return engine.backward(engine.group())
    largest(engine, engine.group())
    report_ready(engine)
    os._exit(3)


def raises(engine) -> float:
    group = engine.group()
    largest(engine, group)
    report_ready(engine)
    if engine.rank:
        raise LookupError("only on rank 1")
    return largest(engine, group)


def never_comes(engine) -> float:
    largest(engine, engine.group())  # so that both are up and running
    group = engine.group(SHORT_PATIENCE)
    largest(engine, group)
    report_ready(engine)
    if engine.rank:
        while not (engine.folder / "0.json").exists():
            time.sleep(0.1)
        os._exit(3)
    return largest(engine, group)


ORDERLY = {"orderly": orderly, "in a grid": in_a_grid}
FATAL = {
    "other batch": lambda engine: later(engine, batch=1),
    "other dtype": lambda engine: later(engine, dtype="float64"),
    "other index groups": lambda engine: later(engine, axis_index_groups=[[0], [1]]),
    "both batches known": lambda engine: later(engine, {"batch": 1}, batch=1),
    "both dtypes known": lambda engine: later(engine, {"dtype": "float64"}, dtype="float64"),
    "statistics of equal size": lambda engine: later(
        engine, {"batch": 4, "num_groups": 2}, batch=4, num_groups=2
    ),
    "dies": dies,
    "dies before backward": dies_before_backward,
    "raises": raises,
    "never comes": never_comes,
}


def compute(scenario: str, engine) -> None:
    file = engine.folder / f"{engine.rank}.json"
    if scenario in ORDERLY:
        file.write_text(json.dumps(ORDERLY[scenario](engine)))
        return
    start = time.monotonic()
    out = {}
    try:
        out = {"returned": FATAL[scenario](engine)}
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        out = {"types": kinds, "message": str(error)}
        raise
    finally:
        file.write_text(json.dumps(out | {"seconds": time.monotonic() - start}))


def limit_this_process() -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # aborts are meant to be


# Processes ----------------------------------------------------------------------------------------
#
# Each gloo rank is a separate process in each scenario, forked because importing PyTorch is slow.


def rank_of_gloo(scenario: str, folder: Path, rank: int) -> None:
    """Run one rank until the end of this process, which was just forked."""
    status = 1
    try:
        with (folder / f"{rank}.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        limit_this_process()
        compute(scenario, Torch(folder, rank))
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_ranks(scenario: str, folder: Path) -> None:
    """Run both ranks until they end, and write their exit statuses."""
    folder.mkdir()
    processes = []
    for rank in range(RANKS):
        process = os.fork()
        if process == 0:
            rank_of_gloo(scenario, folder, rank)
        processes.append(process)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    (folder / "statuses.json").write_text(json.dumps(statuses))


def main(name: str, folder: Path, *scenarios: str) -> None:
    if name == "mpi":
        limit_this_process()
        [scenario] = scenarios
        (folder / scenario).mkdir(exist_ok=True)
        compute(scenario, Mpi(folder / scenario))
        return
    # Imported before the ranks are forked, but not used: threads would not survive the fork.
    import torch.distributed.device_mesh  # noqa: F401

    import groupnorm.backends.torch  # noqa: F401

    for scenario in scenarios:
        run_ranks(scenario, folder / scenario)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
