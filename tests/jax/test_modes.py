"""JAX's modes of debugging raise no false alarm, blame the right operation, change no result."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from groupnorm import group_norm, group_norm_vjp, group_statistics, normalize
from tests import oracle
from tests.core_calls import CALLS, check, draw, reference
from tests.rows import CONTRACT, assert_close

MODES = {
    "nans": lambda: jax.debug_nans(True),
    "infs": lambda: jax.debug_infs(True),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "leaks": lambda: jax.check_tracer_leaks(True),
    "checks": lambda: jax.enable_checks(True),
}


@pytest.fixture(params=[None, "portable"], ids=["default", "portable"])
def implementation(request):
    return request.param


def vjp_by_jax(x, scale, bias, dy, **keywords):
    y, pullback = jax.vjp(lambda *given: group_norm(*given, **keywords), x, scale, bias)
    return y, pullback(dy)


def vjp_by_function(x, scale, bias, dy, **keywords):
    y, pullback = group_norm_vjp(x, scale, bias, **keywords)
    # The convention of complex gradients differs.
    return y, [g.conj() for g in pullback(dy.conj())]


# Each mode looks at all kinds of calls, or at those that differ to it.
# The portable implementation differs for the first two calls only.
PAIRS = [(mode, call, None) for mode in ("nans", "strict dtypes") for call in CALLS]
PAIRS += [(mode, "first", None) for mode in ("infs", "ranks", "leaks", "checks")]
PAIRS += [(mode, "last", "portable") for mode in MODES]


@pytest.mark.parametrize(
    ("how", "compiler"),
    [(vjp_by_jax, lambda f: f), (vjp_by_jax, jax.jit), (vjp_by_function, jax.jit)],
    ids=["eager", "jit", "group_norm_vjp"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("mode", "call", "implementation"), PAIRS)
def test_values_and_gradients(mode, implementation, call, masked, how, compiler, rng):
    if (how, mode, call) == (vjp_by_function, "strict dtypes", "complex"):
        pytest.skip(
            "a limit: group_norm_vjp multiplies complex by real numbers; see docs/limits.md"
        )
    x, dy, scale, bias, keywords = draw(rng, call, masked)
    with jax.enable_x64(True) if call == "float64" else contextlib.nullcontext():
        given = [jnp.asarray(a) for a in (x, scale, bias, dy)]
        with MODES[mode]():
            function = functools.partial(how, implementation=implementation, **keywords)
            y, gradients = compiler(function)(*given)
    gradients = [np.asarray(g).conj() for g in gradients]
    check((y, gradients), reference(x, dy.conj(), scale, bias, keywords), x.dtype.name)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("mode", MODES)
def test_statistics(mode, masked, rng):
    x, _, _, _, keywords = draw(rng, "last", masked)
    given = jnp.asarray(x)
    keywords.pop("epsilon")
    with MODES[mode]():
        y = jax.jit(lambda x: normalize(x, group_statistics(x, **keywords), **keywords))(given)
    assert_close(np.asarray(y), oracle.group_norm(given, **keywords), tolerance=CONTRACT)


@pytest.mark.parametrize("derive", [lambda f: f, jax.value_and_grad], ids=["forward", "gradient"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_nan_is_blamed_on_the_operation_that_made_it(implementation, masked, derive, rng):
    x, _, _, _, keywords = draw(rng, "last", masked)
    x = jnp.asarray(x)

    def function(x):
        y = group_norm(x, implementation=implementation, **keywords)
        return jnp.log(y - 100.0).sum()

    with jax.debug_nans(True):
        for compiled in (function, jax.jit(derive(function))):
            with pytest.raises(FloatingPointError, match="log"):
                compiled(x)


def test_a_nan_in_x_raises_an_alarm(implementation):
    x = jnp.ones((2, 20, 8)).at[0, 3, 2].set(jnp.nan)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        group_norm(x, num_groups=2, implementation=implementation)


@pytest.mark.parametrize(("mode", "epsilon"), [("nans", 0.125), ("ranks", 0.25)])
def test_eager_calls_are_compiled_once(mode, epsilon, rng):
    """By the same options: other options are another program."""
    x, _, _, _, keywords = draw(rng, "last", masked=False)
    x = jnp.asarray(x)
    programs = []

    def traced(message, *_, **__):
        programs.append(message)

    jax.monitoring.register_event_duration_secs_listener(traced)
    try:
        with MODES[mode]():
            counts = []
            for options in ({}, {}, {}, {"activation": "relu"}, {}):
                programs.clear()
                group_norm(x, **{**keywords, "epsilon": epsilon, **options})
                counts.append(len(programs))
    finally:
        jax.monitoring.unregister_event_duration_listener(traced)
    assert [n > 0 for n in counts] == [True, False, False, True, False]
