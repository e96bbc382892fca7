"""Handwritten digits: train in JAX, continue in PyTorch, evaluate in NumPy, with the same layers.

A small convolutional classifier (digits_model.py) is trained with optax on scikit-learn's bundled
digits. Its GroupNorm layers are then converted by ``to_backend("torch")``, trained for another
epoch there, and converted to NumPy and back to JAX. At the end all three compute the test set's
logits and the gradients of the loss with respect to every GroupNorm parameter and to the images,
and must agree: logits to 1e-4, gradients to 1e-4 of the largest one. The exit status is 1 when
they do not. The loss and the activations around the first GroupNorm are drawn to digits.png::

    python examples/digits.py [--out DIR] [--epochs N] [--seed N]
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import digits_model as model
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from digits_figure import draw
from digits_model import Gradients, Parameters, TorchNet
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

BATCH = 64
LEARNING_RATE = 3e-3
LOGITS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4


class Digits(NamedTuple):
    """Images (N, 8, 8, 1) in [0, 1] and labels, for training and for the test."""

    train_x: np.ndarray
    test_x: np.ndarray
    train_y: np.ndarray
    test_y: np.ndarray


class Outcome(NamedTuple):
    """The results of one backend on the test set."""

    logits: np.ndarray
    gradients: Gradients


class Difference(NamedTuple):
    """The differences between two backends."""

    pair: tuple[str, str]
    logits: float
    gradients: float


def load(seed: int) -> Digits:
    """Load the digits, with a stratified fifth of them as test set."""
    digits = load_digits()
    images = (digits.images[..., None] / 16.0).astype(np.float32)
    labels = digits.target.astype(np.int64)
    return Digits(
        *train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    )


def batches(digits: Digits, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One epoch of shuffled batches; the last, shorter one is left out, so jit compiles once."""
    order = rng.permutation(len(digits.train_x))
    for start in range(0, len(order) - BATCH + 1, BATCH):
        chosen = order[start : start + BATCH]
        yield digits.train_x[chosen], digits.train_y[chosen]


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(logits.argmax(axis=1) == labels))


def say(framework: str, epoch: int, losses: list[float], test: float, start: float) -> None:
    print(
        f"{framework:8} epoch {epoch:2d}   loss {np.mean(losses):.4f}   "
        f"test accuracy {test:.1%}   {time.perf_counter() - start:.1f} s",
        flush=True,
    )


def train_in_jax(
    parameters: Parameters, digits: Digits, epochs: int, rng: np.random.Generator
) -> tuple[Parameters, list[float]]:
    """Train with optax's Adam; the layers are pytrees and need no special handling."""
    optimizer = optax.adam(LEARNING_RATE)
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters, state, images, labels):
        loss, gradients = jax.value_and_grad(model.jax_loss)(parameters, images, labels)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, loss

    logits = jax.jit(model.jax_logits)
    losses: list[float] = []
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        fresh = []
        for images, labels in batches(digits, rng):
            parameters, state, loss = step(parameters, state, images, labels)
            fresh.append(float(loss))
        say("JAX", epoch, fresh, accuracy(logits(parameters, digits.test_x), digits.test_y), start)
        losses += fresh
    return parameters, losses


def train_in_torch(net: TorchNet, digits: Digits, rng: np.random.Generator) -> list[float]:
    """One more epoch, on the same layers as modules."""
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE / 3)
    losses: list[float] = []
    start = time.perf_counter()
    for images, labels in batches(digits, rng):
        loss = F.cross_entropy(net(torch.from_numpy(images)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    say("PyTorch", 1, losses, accuracy(torch_logits(net, digits.test_x), digits.test_y), start)
    return losses


def torch_logits(net: TorchNet, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(images)).numpy()


def outcomes(net: TorchNet, digits: Digits) -> dict[str, Outcome]:
    """Evaluate the trained network on the test set with every backend."""
    test = digits.test_x, digits.test_y
    in_jax, in_numpy = net.carried_to("jax"), net.carried_to("numpy")
    logits = np.asarray(jax.jit(model.jax_logits)(in_jax, jnp.asarray(digits.test_x)))
    return {
        "JAX": Outcome(logits, model.jax_gradients(in_jax, *test)),
        "PyTorch": Outcome(torch_logits(net, digits.test_x), model.torch_gradients(net, *test)),
        "NumPy": Outcome(
            model.numpy_logits(in_numpy, digits.test_x), model.numpy_gradients(in_numpy, *test)
        ),
    }


def relative_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.max(np.abs(one - other)) / np.max(np.abs(other)))


def gradient_difference(one: Gradients, other: Gradients) -> float:
    """The largest relative difference over the images and every GroupNorm parameter."""
    pairs = [
        (one.images, other.images),
        *zip(one.scales, other.scales, strict=True),
        *zip(one.biases, other.biases, strict=True),
    ]
    return float(np.max([relative_difference(a, b) for a, b in pairs]))  # np.max keeps a NaN


def compare(results: dict[str, Outcome]) -> list[Difference]:
    """Every pair of backends."""
    return [
        Difference(
            (a, b),
            float(np.max(np.abs(results[a].logits - results[b].logits))),
            gradient_difference(results[a].gradients, results[b].gradients),
        )
        for a, b in itertools.combinations(results, 2)
    ]


def print_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print with rich if it is installed, else as plain text."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"\n{title}")
        for row in (header, *rows):
            print("".join(f"{cell:<32}" for cell in row).rstrip())
        return
    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(f"\n{title}", style="bold", highlight=False)
    console.print(table)


def report(results: dict[str, Outcome], differences: list[Difference], labels: np.ndarray) -> None:
    """Print each backend's accuracy, and its largest differences to the others."""
    rows = []
    for name, result in results.items():
        mine = [difference for difference in differences if name in difference.pair]
        rows.append(
            (
                name,
                f"{accuracy(result.logits, labels):.2%}",
                f"{np.max([difference.logits for difference in mine]):.1e}",
                f"{np.max([difference.gradients for difference in mine]):.1e}",
            )
        )
    header = ("backend", "test accuracy", "logits: max |difference|", "gradients: max relative")
    print_table("The same parameters on every backend, differences to the others", header, rows)


def disagreements(differences: list[Difference]) -> list[str]:
    """One sentence for every pair whose difference exceeds a tolerance."""
    return [
        f"{' and '.join(pair)}: {what} differ by {difference:.1e}, more than {tolerance:g}"
        for pair, logits, gradients in differences
        for what, difference, tolerance in (
            ("logits", logits, LOGITS_TOLERANCE),
            ("gradients", gradients, GRADIENT_TOLERANCE),
        )
        if not difference <= tolerance  # written so that a NaN is a disagreement too
    ]


def carried_exactly(before: Parameters, after: TorchNet) -> bool:
    """Whether parameter values are bitwise equal after `to_backend`."""
    return all(
        np.array_equal(np.asarray(jax_norm.scale), torch_norm.scale.detach().numpy())
        and np.array_equal(np.asarray(jax_norm.bias), torch_norm.bias.detach().numpy())
        for jax_norm, torch_norm in zip(before.norms, after.norms, strict=True)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output", metavar="DIR")
    parser.add_argument("--epochs", type=int, default=12, help="epochs in JAX (default 12)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    digits = load(options.seed)
    rng = np.random.default_rng(options.seed)
    print(f"{len(digits.train_x)} digits to train on, {len(digits.test_x)} for the test")
    parameters, jax_losses = train_in_jax(model.init(options.seed), digits, options.epochs, rng)
    net = TorchNet(parameters)
    problems = [] if carried_exactly(parameters, net) else ["to_backend changed parameter values"]
    torch_losses = train_in_torch(net, digits, rng)

    results = outcomes(net, digits)
    differences = compare(results)
    report(results, differences, digits.test_y)
    problems += disagreements(differences)
    picture = draw(options.out, net.carried_to("numpy"), digits.test_x, jax_losses, torch_losses)
    print(f"\npicture: {picture}")
    if problems:
        print("\nThe backends DISAGREE:", *problems, sep="\n  ", file=sys.stderr)
        return 1
    print(
        f"All backends agree: logits within {LOGITS_TOLERANCE:g}, "
        f"gradients within {GRADIENT_TOLERANCE:g} relative."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
