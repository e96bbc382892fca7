"""What every framework is tried with, and what came out."""

from __future__ import annotations

import os
import tempfile
from typing import Any, NamedTuple

import numpy as np

import groupnorm
from groupnorm import GroupNorm
from groupnorm.testing import oracle
from tests.frameworks.rows import Row

CHANNELS, GROUPS, EPSILON = 8, 4, 0.25
SHAPE = (6, 5, CHANNELS)


class Findings(NamedTuple):
    """What was found of one framework; None is what its backend cannot do."""

    framework: str
    #: The largest errors, against float64: of the module's results, compiled ones, gradients.
    result: float
    compiled: float
    gradient: float | None
    #: The loss before and after the training.
    losses: tuple[float, float] | None
    #: Whether parameters have equal bits: carried in and out, by the framework's own file, and by
    #: `groupnorm.save`.
    carried: bool
    round_trip: bool
    saved: bool
    #: The names of what is trained.
    listed: tuple[str, ...]


def host(x: Any) -> np.ndarray:
    return np.asarray(x.detach() if hasattr(x, "detach") else x)


def source(rng: np.random.Generator) -> GroupNorm:
    scale, bias = rng.normal(size=(2, CHANNELS)).astype(np.float32)
    return GroupNorm(
        (..., CHANNELS), num_groups=GROUPS, epsilon=EPSILON, scale_init=scale, bias_init=bias
    )


def same_bits(one: GroupNorm, other: GroupNorm) -> bool:
    one, other = one.to_backend("numpy"), other.to_backend("numpy")
    return (
        one.num_groups == other.num_groups
        and one.epsilon == other.epsilon
        and all(
            getattr(one, name).tobytes() == getattr(other, name).tobytes()
            for name in ("scale", "bias")
        )
    )


def examine(row: Row, rng: np.random.Generator) -> Findings:
    """Try everything with a framework."""
    layer = source(rng)
    x, dy, target = rng.normal(size=(3, *SHAPE)).astype(np.float32)
    x += 1000
    inputs = [row.asarray(np.moveaxis(a, -1, 1) if row.first else a) for a in (x, dy, target)]

    def error(y: Any, want: np.ndarray) -> float:
        y = np.moveaxis(host(y), 1, -1) if row.first else host(y)
        assert y.shape == want.shape
        return float(np.max(np.abs(y - want) / np.maximum(1, np.abs(want))))

    model = row.model(layer)
    want = oracle.group_norm(x, layer.scale, layer.bias, num_groups=GROUPS, epsilon=EPSILON)
    result = error(row.call(model, inputs[0]), want)
    compiled = error(row.compiled(model, inputs[0]), want)
    carried = same_bits(layer, row.layer(model))
    gradient = losses = None
    if row.trains:
        wanted = oracle.group_norm_gradients(
            x, dy, layer.scale, layer.bias, num_groups=GROUPS, epsilon=EPSILON
        )
        found = row.gradient(model, *inputs[:2])
        gradient = max(
            float(np.max(np.abs(host(g).reshape(-1) - w)) / np.max(np.abs(w)))
            for g, w in zip(found, (wanted.scale, wanted.bias), strict=True)
        )
        model, history = row.train(model, inputs[0], inputs[2])
        losses = history[0], history[-1]
    listed = tuple(row.listed(model))
    trained = row.layer(model)
    again = row.round_trip(model, row.model(source(rng)))
    round_trip = same_bits(trained, row.layer(again))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "layer.safetensors")
        groupnorm.save(path, trained)
        saved = same_bits(trained, groupnorm.load(path))
    return Findings(
        row.name, result, compiled, gradient, losses, carried, round_trip, saved, listed
    )
