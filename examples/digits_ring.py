"""Handwritten digits: one network in six frameworks, and one set of weights carried around them.

The network of digits.py is written in flax nnx, flax linen, equinox, haiku, keras and PyTorch with
each framework's own modules and layout (digits_ring_models.py), and with this library's group
norms, which are modules of the framework. It is trained in flax nnx. Then its weights go around::

    nnx -> linen -> equinox -> haiku -> keras -> PyTorch -> nnx

At each stop the parameters are read off the model before: group norms by ``GroupNorm.from_`` and
``layer.to_``, convolutions and the dense layer by transposing arrays. Every stop must have weights
of equal bits, and logits of the test set within 1e-5 of the trained model's and of those that NumPy
computes in float64. The exit status is 1 when one has not::

    python examples/digits_ring.py [--epochs N] [--seed N]

Keras computes with JAX, or with what the environment says: ``KERAS_BACKEND=torch`` or ``numpy``.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from typing import Any, NamedTuple

import digits_ring_models as models  # before whatever may import keras
import jax
import numpy as np
import optax
from digits import LEARNING_RATE, Digits, accuracy, batches, load, say
from digits_model import Parameters, numpy_logits
from digits_ring_models import NnxNet, Weights
from flax import nnx

from groupnorm.testing import oracle
from groupnorm.text_tables import print_table

TOLERANCE = 1e-5
HEADER = (
    *("stop", "convolutions", "dense", "norms"),
    *("logits: to the first", "to float64", "bits", "test accuracy", "time"),
)


class Stop(NamedTuple):
    """What holds of the model of one framework, compared with the trained one."""

    name: str
    carried: tuple[str, ...]
    to_first: float
    to_float64: float
    equal: bool
    accuracy: float
    seconds: float

    def line(self) -> tuple[str, ...]:
        return (
            self.name,
            *self.carried,
            f"{self.to_first:.1e}",
            f"{self.to_float64:.1e}",
            "equal" if self.equal else "WRONG",
            f"{self.accuracy:.2%}",
            f"{self.seconds:.1f} s",
        )

    def problems(self) -> list[str]:
        """One sentence for every bound that is not held."""
        differences = (("those of the trained model", self.to_first), ("float64", self.to_float64))
        found = [
            f"{self.name}: logits differ from {what} by {difference:.1e}, more than {TOLERANCE:g}"
            for what, difference in differences
            if not difference <= TOLERANCE  # written so that a NaN is a problem too
        ]
        return found if self.equal else [*found, f"{self.name}: other bits, or other norms"]


def train(digits: Digits, epochs: int, seed: int) -> NnxNet:
    """Train a model of flax nnx with optax's Adam."""
    net = NnxNet(seed)
    optimizer = nnx.Optimizer(net, optax.adam(LEARNING_RATE), wrt=nnx.Param)

    @nnx.jit
    def step(net: NnxNet, optimizer: nnx.Optimizer, images: Any, labels: Any) -> jax.Array:
        def loss(net: NnxNet) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(net(images), labels).mean()

        value, gradient = nnx.value_and_grad(loss)(net)
        optimizer.update(net, gradient)
        return value

    rng = np.random.default_rng(seed)
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        losses = [float(step(net, optimizer, *batch)) for batch in batches(digits, rng)]
        logits = models.Nnx.logits(net, digits.test_x)
        say("flax nnx", epoch, losses, accuracy(logits, digits.test_y), start)
    return net


def float64_logits(weights: Weights, images: np.ndarray) -> np.ndarray:
    """Logits by NumPy; the group norms' reference shares no code with the library."""
    arrays = [array.astype(np.float64) for array in weights.arrays()]
    conv1, conv2, scale1, bias1, scale2, bias2, dense, bias = arrays
    norms = tuple(
        functools.partial(
            oracle.group_norm, scale=scale, bias=bias,
            num_groups=norm.num_groups, epsilon=norm.epsilon,
        )
        for norm, scale, bias in zip(
            weights.norms, (scale1, scale2), (bias1, bias2), strict=True
        )
    )  # fmt: skip
    parameters = Parameters((conv1, conv2), norms, dense, bias)
    return numpy_logits(parameters, images.astype(np.float64))


def equal_bits(before: Weights, after: Weights) -> bool:
    """Whether no bit of a parameter has changed, and no option of a group norm."""
    return all(
        (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())
        for a, b in zip(before.arrays(), after.arrays(), strict=True)
    ) and all(
        (a.num_groups, a.epsilon) == (b.num_groups, b.epsilon)
        for a, b in zip(before.norms, after.norms, strict=True)
    )


def go_around(net: NnxNet, digits: Digits) -> tuple[list[Stop], NnxNet]:
    """Carry the weights of a model around the ring; also return the model at the end of it."""
    first = models.Nnx.read(net)
    first_logits = models.Nnx.logits(net, digits.test_x)
    exact = float64_logits(first, digits.test_x)

    def stop(framework: Any, carried: tuple[str, ...], model: Any, start: float) -> Stop:
        logits = framework.logits(model, digits.test_x)
        return Stop(
            framework.name,
            carried,
            float(np.max(np.abs(logits - first_logits))),
            float(np.max(np.abs(logits - exact))),
            equal_bits(first, framework.read(model)),
            accuracy(logits, digits.test_y),
            time.perf_counter() - start,
        )

    framework, model = models.Nnx, net
    stops = [stop(framework, framework.layout, model, time.perf_counter())]
    for target in models.RING:
        start = time.perf_counter()
        carried = tuple(
            there if here == there else f"{here} -> {there}"
            for here, there in zip(framework.layout, target.layout, strict=True)
        )
        model = target.build(framework.read(model))
        framework = target
        stops.append(stop(framework, carried, model, start))
    return stops, model


def equal_states(before: NnxNet, after: NnxNet) -> bool:
    """Whether two models have the same parameters, as flax itself lists them."""
    states = [
        {path: models.host(value[...]) for path, value in nnx.to_flat_state(nnx.state(net))}
        for net in (before, after)
    ]
    return states[0].keys() == states[1].keys() and all(
        value.dtype == states[1][path].dtype and value.tobytes() == states[1][path].tobytes()
        for path, value in states[0].items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8, help="epochs in flax nnx (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    digits = load(options.seed)
    print(f"{len(digits.train_x)} digits to train on, {len(digits.test_x)} for the test")
    net = train(digits, options.epochs, options.seed)
    stops, last = go_around(net, digits)
    print("\nThe same weights in every framework, and how they are stored there:")
    print_table(HEADER, [stop.line() for stop in stops])

    problems = [problem for stop in stops for problem in stop.problems()]
    if not equal_states(net, last):
        problems.append("the state of the last model is not that of the trained one")
    if problems:
        print("\nThe frameworks DISAGREE:", *problems, sep="\n  ", file=sys.stderr)
        return 1
    print(
        f"All frameworks agree: logits within {TOLERANCE:g}, also of float64, "
        "and after the whole ring the weights have equal bits."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
