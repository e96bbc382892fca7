"""JAX's modes of debugging raise no false alarm, blame the right operation, change no result."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from groupnorm import (
    group_norm,
    group_norm_vjp,
    group_statistics,
    merge_statistics,
    normalize,
)
from groupnorm.errors import ArgumentTypeError
from groupnorm.testing import oracle
from tests.core_calls import CALLS, check, draw, reference
from tests.rows import CONTRACT, assert_close

pytestmark = pytest.mark.one_jax_device  # with several, what computes is "portable", as below

# Modes that do not hinder each other are on together: each combination compiles every call again.
MODES = {
    "values": lambda: (jax.debug_nans(True), jax.debug_infs(True)),
    "strict": lambda: (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.enable_checks(True),
    ),
    "leaks": lambda: (jax.check_tracer_leaks(True),),
}


@contextlib.contextmanager
def on(mode):
    with contextlib.ExitStack() as stack:
        for context in MODES[mode]():
            stack.enter_context(context)
        yield


def vjp_by_jax(x, scale, bias, dy, **keywords):
    y, pullback = jax.vjp(lambda *given: group_norm(*given, **keywords), x, scale, bias)
    return y, pullback(dy)


def vjp_by_function(x, scale, bias, dy, **keywords):
    y, pullback = group_norm_vjp(x, scale, bias, **keywords)
    # The convention of complex gradients differs.
    return y, [g.conj() for g in pullback(dy.conj())]


HOW = {
    "eager": vjp_by_jax,
    "jit": lambda *given, **keywords: jax.jit(functools.partial(vjp_by_jax, **keywords))(*given),
    "group_norm_vjp": lambda *given, **keywords: jax.jit(
        functools.partial(vjp_by_function, **keywords)
    )(*given),
    "eager group_norm_vjp": vjp_by_function,
}
# Values are checked after every operation outside of jax.jit, and after the program in it. What is
# strict is found while tracing. The first mode raises for what is masked out, if any does.
ROWS = [("values", "eager", None, call, True) for call in CALLS]
ROWS += [("values", "eager", None, call, False) for call in ("first", "complex")]
ROWS += [
    ("values", "eager", "portable", *row)
    for row in (("last", True), ("last", False), ("long", False))
]
ROWS += [("values", "eager group_norm_vjp", "portable", call, False) for call in CALLS]
ROWS += [("values", "eager group_norm_vjp", "portable", "complex", True)]
ROWS += [
    ("values", "eager group_norm_vjp", None, *row) for row in (("last", True), ("last", False))
]
ROWS += [("values", how, None, "first", True) for how in ("jit", "group_norm_vjp")]
ROWS += [
    ("strict", how, None, call, masked)
    for how in ("jit", "group_norm_vjp")
    for call in CALLS
    for masked in (True, False)
]
ROWS += [("strict", "eager", None, call, True) for call in ("first", "complex")]
ROWS += [("strict", how, "portable", "last", True) for how in ("jit", "group_norm_vjp")]
ROWS += [("leaks", how, None, "first", True) for how in ("jit", "group_norm_vjp")]
ROWS += [("leaks", "jit", "portable", "last", True)]


@pytest.mark.parametrize(("mode", "how", "implementation", "call", "masked"), ROWS)
def test_values_and_gradients(mode, how, implementation, call, masked, rng):
    x, dy, scale, bias, keywords = draw(rng, call, masked)
    with jax.enable_x64(True) if call == "float64" else contextlib.nullcontext():
        given = [jnp.asarray(a) for a in (x, scale, bias, dy)]
        with on(mode):
            y, gradients = HOW[how](*given, implementation=implementation, **keywords)
    gradients = [np.asarray(g).conj() for g in gradients]
    check((y, gradients), reference(x, dy.conj(), scale, bias, keywords), x.dtype.name)


@pytest.mark.parametrize(("call", "masked"), [("last", False), ("last", True), ("complex", True)])
def test_statistics_that_are_not_compiled(call, masked, rng):
    x, _, scale, bias, keywords = draw(rng, call, masked)
    epsilon, mask = keywords.pop("epsilon"), keywords.pop("mask", None)
    given, scale, bias = map(jnp.asarray, (x, scale, bias))
    halves = zip(
        jnp.split(given, 2, axis=-2),
        (None, None) if mask is None else np.split(mask, 2, axis=-2),
        strict=True,
    )
    with on("values"):
        parts = [group_statistics(half, mask=m, **keywords) for half, m in halves]
        merged = merge_statistics(*parts)
        y = normalize(given, merged, scale, bias, epsilon=epsilon, mask=mask, **keywords)
    want = oracle.group_norm(x, scale, bias, epsilon=epsilon, mask=mask, **keywords)
    assert_close(np.asarray(y), want, tolerance=CONTRACT)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("mode", MODES)
def test_statistics(mode, masked, rng):
    x, _, _, _, keywords = draw(rng, "last", masked)
    given = jnp.asarray(x)
    keywords.pop("epsilon")
    with on(mode):
        y = jax.jit(lambda x: normalize(x, group_statistics(x, **keywords), **keywords))(given)
    assert_close(np.asarray(y), oracle.group_norm(given, **keywords), tolerance=CONTRACT)


@pytest.mark.parametrize("compiler", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("call", ["last", "complex", "bfloat16"])
@pytest.mark.parametrize("mode", ["strict", "leaks"])
def test_merged_statistics(mode, call, compiler, rng):
    """Of both halves of the positions."""
    x, _, scale, bias, keywords = draw(rng, call, masked=False)
    epsilon = keywords.pop("epsilon")

    def function(x, scale, bias):
        halves = (group_statistics(half, **keywords) for half in jnp.split(x, 2, axis=-2))
        merged = merge_statistics(*halves)
        return normalize(x, merged, scale, bias, epsilon=epsilon, **keywords)

    with on(mode):
        y = compiler(function)(*map(jnp.asarray, (x, scale, bias)))
    want = oracle.group_norm(x, scale, bias, epsilon=epsilon, **keywords)
    assert_close(np.asarray(y), want, tolerance=2.0**-7 if call == "bfloat16" else CONTRACT)


@pytest.mark.parametrize(
    "compiler",
    [lambda f: f, jax.jit, lambda f: jax.jit(jax.value_and_grad(f))],
    ids=["eager", "jit", "gradient"],
)
@pytest.mark.parametrize(
    ("implementation", "masked"), [(None, False), (None, True), ("portable", True)]
)
def test_a_nan_is_blamed_on_the_operation_that_made_it(implementation, masked, compiler, rng):
    x, _, _, _, keywords = draw(rng, "last", masked)
    x = jnp.asarray(x)

    def function(x):
        y = group_norm(x, implementation=implementation, **keywords)
        return jnp.log(y - 100.0).sum()

    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="log"):
        compiler(function)(x)


@pytest.mark.parametrize("implementation", [None, "portable"])
def test_a_nan_in_x_raises_an_alarm(implementation):
    x = jnp.ones((2, 20, 8)).at[0, 3, 2].set(jnp.nan)
    for call in (group_norm, group_norm_vjp):
        with jax.debug_nans(True), pytest.raises(FloatingPointError):
            call(x, num_groups=2, implementation=implementation)


@pytest.mark.parametrize("implementation", [None, "portable"])
@pytest.mark.parametrize(("kind", "value"), [("nan", np.nan), ("inf", np.inf)])
def test_the_call_whose_result_is_not_finite_is_blamed(kind, value, implementation, rng):
    x, dy, *_ = map(jnp.asarray, draw(rng, "last", masked=False)[:4])
    statistics = group_statistics(x, num_groups=2)
    scale, finite = jnp.ones(8).at[3].set(value), jnp.ones(8)
    infinite_dy = dy.at[0, 0, 0, 0].set(value)
    options = {"num_groups": 2, "implementation": implementation}
    # A compiled pullback is computed again by JAX, operation by operation, to find the first.
    pullback_name = "gradients" if implementation == "portable" else ""
    with jax.debug_nans(kind == "nan"), jax.debug_infs(kind == "inf"):
        _, pullback = group_norm_vjp(x, bias=finite, **options)
        for call, name in (
            (lambda: group_norm_vjp(x, scale, **options), "groupnorm.*norm"),
            (lambda: normalize(x, statistics, scale, num_groups=2), "groupnorm.*normalize"),
            (lambda: pullback(infinite_dy), pullback_name),
        ):
            with pytest.raises(FloatingPointError, match=rf"\({kind}\) encountered in .*{name}"):
                call()


# Lists, and arrays on the host, have no hash: as a part of a program they would be compiled again.
HOST = {
    "none": lambda mask, i: {},
    "mask": lambda mask, i: {"mask": mask.copy()},
    "list": lambda mask, i: {"mask": mask.tolist()},
    "another mask": lambda mask, i: {"mask": np.roll(mask, i)},
    "parameters": lambda mask, i: {"scale": np.ones(8), "bias": np.ones(8, "float32")},
}


@pytest.mark.parametrize("host", HOST)
@pytest.mark.parametrize(("mode", "epsilon"), [("values", 0.125), ("strict", 0.25)])
def test_eager_calls_are_compiled_once(mode, epsilon, host, rng):
    """By the same options: other options are another program."""
    x, _, _, _, keywords = draw(rng, "last", masked=False)
    x, mask = jnp.asarray(x), rng.random((2, 5, 6, 1)) < 0.6
    epsilon += list(HOST).index(host) / 100
    programs = []

    def traced(message, *_, **__):
        programs.append(message)

    jax.monitoring.register_event_duration_secs_listener(traced)
    try:
        with on(mode):
            counts = []
            for i, options in enumerate(({}, {}, {}, {"activation": "relu"}, {})):
                programs.clear()
                given = {**keywords, "epsilon": epsilon, **options, **HOST[host](mask, i)}
                group_norm(x, **given)
                counts.append(len(programs))
    finally:
        jax.monitoring.unregister_event_duration_listener(traced)
    assert [n > 0 for n in counts] == [True, False, False, True, False]


def test_what_a_call_refuses_is_not_kept():
    """Caches of programs hold no arguments."""

    class Scale:
        """Has a hash, as tensors of other libraries have."""

    scale = Scale()
    gone = weakref.ref(scale)
    with on("values"), pytest.raises(ArgumentTypeError, match="scale"):
        group_norm(jnp.ones((2, 8)), scale, num_groups=2)
    del scale
    gc.collect()
    assert gone() is None
