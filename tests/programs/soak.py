"""Call layers for a while, from several threads: results stay right, and memory flat.

``python tests/programs/soak.py SECONDS [--threads 4] [--seed 0] [--slack 16]``

Every call has another shape, dtype, mask and layer than the one before, so that every cache is
filled and turned over; some calls are differentiated, some with the pullback run in another thread
than the forward pass, or never. A third of the time warms up; then the largest resident size of the
last third may exceed that of the second by at most `slack` MiB.
"""

from __future__ import annotations

import argparse
import os
import queue
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from groupnorm import GroupNorm

LAYERS = [
    (channels, groups, axis, activation)
    for channels, groups in ((4, 2), (8, 8), (12, 1), (32, 4))
    for axis in (0, -1)
    for activation in (None, "silu")
]
EPSILON = 1e-2  # so that no gradient is large against its rounding, for one valid element too
SCALES, BIASES = (0.5, 1.5), (-1.0, 1.0)
DTYPES = ("float32", "float32", "float64", "float16", "complex64")
NAMES = ("y", "dx", "dscale", "dbias")
# Far above the rounding of each, and far below any fault of threads: see tests/fuzz for accuracy.
TOLERANCE = {"float16": 1e-2, "float32": 1e-4, "float64": 1e-8, "complex64": 1e-4}


def resident() -> float:
    """Return the process's resident memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def reference(x, dy, scale, bias, groups: int, valid, silu: bool):
    """Return y, dx and the parameters' gradients of x of shape (N, P, C), all valid or masked."""
    wide = np.complex128 if x.dtype.kind == "c" else np.float64
    n, positions, channels = x.shape
    grouped = (n, positions, groups, channels // groups)
    counted = np.broadcast_to(valid, x.shape).reshape(grouped)
    x = np.where(counted, np.nan_to_num(x.astype(wide)).reshape(grouped), 0)
    count = np.maximum(counted.sum((1, 3), keepdims=True), 1)
    mean = x.sum((1, 3), keepdims=True) / count
    var = (np.abs(np.where(counted, x - mean, 0)) ** 2).sum((1, 3), keepdims=True) / count
    var = np.where(counted.any((1, 3), keepdims=True), var, 1)
    rstd = 1 / np.sqrt(var + EPSILON)
    xhat = ((x - mean) * rstd).reshape(n, positions, channels)
    z = xhat * scale + bias
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-z)) if silu else 1
    dz = dy * (s * (1 + z * (1 - s)) if silu else 1)
    h, hat = (dz * scale).reshape(grouped), xhat.reshape(grouped)
    p = h.sum((1, 3), keepdims=True) / count
    q = (np.conj(h) * hat).real.sum((1, 3), keepdims=True) / count
    dx = (rstd * (h - counted * (p + hat * q))).reshape(n, positions, channels)
    return z * s, dx, (np.conj(xhat) * dz).sum((0, 1)).real, dz.sum((0, 1)).real


class Worker(threading.Thread):
    """Calls layers until told to stop; pullbacks may be run by another worker."""

    def __init__(self, seed: int, until: float, shared: queue.SimpleQueue) -> None:
        super().__init__(name=f"soak-{seed}")
        self.rng, self.until, self.shared = np.random.default_rng(seed), until, shared
        self.calls, self.error = 0, None
        self.layers = {}

    def run(self) -> None:
        try:
            while time.monotonic() < self.until:
                self.call()
                self.calls += 1
        except BaseException as error:
            self.error = error

    def layer(self, backend: str, number: int):
        """Return a layer; sometimes another one of the same kind, made anew."""
        key = backend, number
        if key not in self.layers or self.rng.random() < 0.01:
            channels, groups, axis, activation = LAYERS[number]
            size = (channels, ...) if axis == 0 else (..., channels)
            self.layers[key] = GroupNorm(
                size, axis, groups, backend=backend, activation=activation, epsilon=EPSILON,
                scale_init=lambda shape, dtype: np.linspace(*SCALES, shape[0], dtype=dtype),
                bias_init=lambda shape, dtype: np.linspace(*BIASES, shape[0], dtype=dtype),
            )  # fmt: skip
        return self.layers[key]

    def call(self) -> None:
        rng = self.rng
        number = int(rng.integers(len(LAYERS)))
        channels, groups, axis, activation = LAYERS[number]
        dtype = DTYPES[rng.integers(len(DTYPES))]
        masked = rng.random() < 0.5
        if (activation and dtype == "complex64") or (dtype == "float16" and (activation or masked)):
            dtype = "float32"  # has no activation, or would need a kernel of its own
        shape = (int(rng.integers(1, 6)), int(rng.integers(1, 300)), channels)
        x, dy = rng.normal(size=(2, *shape)) + 0j if dtype == "complex64" else rng.normal(
            size=(2, *shape))  # fmt: skip
        x = (3 + x).astype(dtype)
        mask, valid = None, np.ones((1, 1, 1), bool)
        if masked:
            mask = valid = rng.random((shape[0], shape[1], 1)) < 0.8
            x = np.where(valid, x, x.dtype.type(np.nan))
        result = np.result_type(x.dtype, np.float32)
        # Exact in x's dtype, in which a layer that is an `nn.GroupNorm` returns y.
        dy = dy.astype(x.dtype).astype(result)
        scale, bias = (
            np.linspace(*ends, channels, dtype=np.float32).astype(np.float64)
            for ends in (SCALES, BIASES)
        )
        want = reference(x, dy, scale, bias, groups, valid, activation == "silu")
        if axis == 0:
            x, dy = (np.swapaxes(a, 1, 2) for a in (x, dy))
            x, dy = (np.ascontiguousarray(a) if rng.random() < 0.5 else a for a in (x, dy))
            mask = None if mask is None else np.swapaxes(mask, 1, 2)
        where = f"{dtype} {shape}, layer {LAYERS[number]}, mask {mask is not None}"
        if rng.random() < 0.5:
            finish = self.numpy(number, x, dy, mask)
        else:
            finish = self.torch(number, x, dy, mask)

        def compare():
            got = finish()
            for name, actual, expected in zip(NAMES, got, want, strict=True):
                if axis == 0 and name in ("y", "dx"):
                    actual = np.swapaxes(actual, 1, 2)
                ok = np.ones(actual.shape, bool)
                if name == "dx":  # a masked-out NaN is the constant 0
                    ok = np.broadcast_to(valid, actual.shape)
                size = np.abs(expected).max(initial=1)
                error = np.abs(np.where(ok, actual - expected, 0)).max(initial=0)
                # The parameters, and so their gradients, are float32.
                tolerance = TOLERANCE[dtype if name in ("y", "dx") else "float32"]
                assert error <= tolerance * size, f"{name} of {where}: error {error}"

        match int(rng.integers(4)):
            case 0:  # another thread, later
                self.shared.put(compare)
            case 1:  # never: what forward keeps must be released
                pass
            case _:
                compare()
        if self.shared.qsize() > 8:
            self.shared.get()()

    def numpy(self, number: int, x, dy, mask):
        y, pullback = self.layer("numpy", number).vjp(x, mask)
        return lambda: (y, *pullback(dy))

    def torch(self, number: int, x, dy, mask):
        layer = self.layer("torch", number)
        leaf = torch.from_numpy(x).requires_grad_()
        mask = None if mask is None else torch.from_numpy(mask)
        y = layer(leaf, mask)
        parameters = [layer.weight, layer.bias]
        cotangent = torch.from_numpy(dy).to(y.dtype)

        def finish():
            grads = torch.autograd.grad(y, [leaf, *parameters], cotangent)
            return tuple(a.detach().numpy() for a in (y, *grads))

        return finish


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slack", type=float, default=16)
    options = parser.parse_args()
    shared = queue.SimpleQueue()
    first = Worker(options.seed, 0, shared)
    for _ in range(400):  # compiles every kernel that is needed
        first.call()
    start = time.monotonic()
    until = start + options.seconds
    workers = [Worker(options.seed + i, until, shared) for i in range(1, options.threads + 1)]
    for worker in workers:
        worker.start()
    largest, report = [0.0, 0.0, 0.0], start
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.05)
        now = time.monotonic()
        part = min(2, int(3 * (now - start) / options.seconds))
        largest[part] = max(largest[part], resident())
        if now >= report:
            report = now + max(1.0, options.seconds / 20)
            calls = sum(worker.calls for worker in workers)
            print(f"{now - start:6.0f} s {calls:9d} calls {resident():8.1f} MiB", flush=True)
        if any(worker.error for worker in workers):
            for worker in workers:
                worker.until = 0
    for worker in workers:
        worker.join()
        if worker.error is not None:
            raise worker.error
    growth = largest[2] - largest[1]
    calls = sum(worker.calls for worker in workers)
    print(
        f"{calls} calls, all right; largest resident size of each third: "
        f"{', '.join(f'{size:.1f}' for size in largest)} MiB, growth {growth:.1f} MiB"
    )
    return int(growth > options.slack)


if __name__ == "__main__":
    sys.exit(main())
