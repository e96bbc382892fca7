"""Functions that are wrong in subtle ways are caught, and right ones are not blamed."""

from __future__ import annotations

import numpy as np
import pytest
from array_api_compat import array_namespace

from groupnorm import testing
from groupnorm.errors import ArgumentTypeError, ArgumentValueError

pytestmark = pytest.mark.needs("array_api_strict", "dask", "jax", "torch")

ALL = "numpy,jax,jax:jit,torch,array_api_strict"


@pytest.fixture
def x(rng):
    return rng.normal(size=(4, 16)).astype(np.float32)


def hard(*names):
    return testing.hard_inputs((4, 16), names=names)


# Right functions ---------------------------------------------------------------------------------


def total(x):
    xp = array_namespace(x)
    return xp.sum(x * x)


def logsumexp(x):
    xp = array_namespace(x)
    largest = xp.max(x, axis=-1, keepdims=True)
    return xp.log(xp.sum(xp.exp(x - largest), axis=-1, keepdims=True)) + largest


def softmax(x):
    xp = array_namespace(x)
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)


def masked_square(x, mask):
    xp = array_namespace(x)
    kept = xp.where(mask, x, xp.zeros_like(x))  # the remedy for the gradient of where
    return kept * kept


RIGHT = {
    "a scalar": (total, hard("normal", "spike")),
    "0-d": (lambda x: x * x, np.array(2.5, np.float32)),
    "log": (lambda x: array_namespace(x).log(x), hard("lognormal", "ramp")),
    "square root": (lambda x: array_namespace(x).sqrt(x), hard("lognormal", "ramp", "constant")),
    "reciprocal": (lambda x: 1 / x, hard("lognormal", "ramp")),
    "gaussian": (
        lambda x: array_namespace(x).exp(-x * x),
        hard("normal", "spike", "spikes at both ends", "lognormal", "tiny", "subnormal"),
    ),
    "relu": (
        lambda x: array_namespace(x).where(x > 0, x, 0 * x),
        hard("normal", "spike", "lognormal", "tiny"),
    ),
    "logsumexp": (logsumexp, hard("normal", "lognormal", "channel means", "tiny", "subnormal")),
    "softmax": (softmax, hard("normal", "lognormal", "channel means", "tiny", "large half")),
    "a shift": (lambda x: x + 1, hard("normal", "tiny", "subnormal")),
    "a gradient of zero": (lambda x: array_namespace(x).sum(softmax(x)), hard("normal")),
    "overflow": (lambda x: x * x, hard("huge")),
    "underflow": (lambda x: x * x, np.full(3, 1e-30, np.float32)),
    "in float64": (total, testing.hard_inputs(9, np.float64, names=("normal", "constant"))),
    "kinks": (
        lambda x: array_namespace(x).where(x > 0, x, 0 * x),
        np.array([0, 1, -2], np.float32),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_function_is_not_blamed(name):
    function, inputs = RIGHT[name]
    report = testing.check(function, inputs=inputs, rows=ALL)
    report.raise_if_wrong()
    assert {f.what for f in report.findings if f.row == "torch"} >= {"value"}


@pytest.mark.parametrize("function", [total, softmax, logsumexp])
def test_gradients_of_right_functions_are_compared(function, x):
    report = testing.check(function, inputs=x, rows="torch,jax:jit")
    report.raise_if_wrong()
    assert not [s for s in report.skipped if "gradient" in s.what]
    where = {f.where for f in report.findings if f.what == "gradient"}
    assert where == {"gradient of argument 0", "gradient of argument 0, all elements"}


def test_padding_without_effect_has_no_gradient(x, rng):
    mask = rng.random(x.shape) < 0.6
    padded = testing.pad_with_nan(x, mask)
    testing.check(masked_square, inputs=(padded, mask), rows=ALL).raise_if_wrong()


def test_matrix_functions_with_named_results(rng):
    a = (rng.normal(size=(3, 3)) + 4 * np.eye(3)).astype(np.float32)
    report = testing.check(
        lambda a: array_namespace(a).linalg.slogdet(a), inputs=a, rows="numpy,torch"
    )
    report.raise_if_wrong()


def test_gradients_in_inference_mode(x):
    import torch

    with torch.inference_mode():
        testing.check(total, inputs=x, rows="torch").raise_if_wrong()


# Wrong functions ---------------------------------------------------------------------------------


def only(library, wrong, right):
    """Return a function that is wrong in one library."""
    return lambda *a: (wrong if library in type(a[0]).__module__ else right)(*a)


def torch_function(backward):
    """Return the sum of squares with a backward of its own."""
    import torch

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x * x).sum()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return backward(x, g)

    return Wrong.apply


def wrong_in_the_tail(x, g):
    gradient = 2 * x * g
    gradient.view(-1)[-8:] = 0
    return gradient


def wrong_and_writes(x, g):
    gradient = 2 * x * g
    x.data.mul_(0)
    return gradient


@pytest.mark.parametrize(
    ("backward", "message"),
    [(wrong_in_the_tail, "all elements"), (wrong_and_writes, "wrote to its input")],
)
def test_a_wrong_backward_is_caught(backward, message, rng):
    x = rng.normal(size=5000).astype(np.float32)
    report = testing.check(
        {"torch": torch_function(backward)}, inputs=x, reference=total, rows="torch"
    )
    with pytest.raises(testing.Disagreement, match=message):
        report.raise_if_wrong()


def test_nan_in_one_of_many_gradients_is_caught(rng):
    x = rng.normal(size=2000).astype(np.float32)

    def vjp(x, dy):
        gradient = 2 * x * dy
        gradient[1234] = np.nan
        return gradient

    report = testing.check(total, inputs=x, vjp=vjp, rows="numpy")
    assert "gradient of argument 0, all elements" in [f.where for f in report.wrong]


def test_a_gradient_that_leaks_from_the_padding_is_caught(x, rng):
    def leaks(x, mask):
        xp = array_namespace(x)
        return xp.where(mask, x * x, xp.zeros_like(x))  # 0 * NaN in its gradient

    mask = rng.random(x.shape) < 0.6
    padded = testing.pad_with_nan(x, mask)
    report = testing.check(leaks, inputs=(padded, mask), rows="torch,jax")
    assert {f.row for f in report.wrong} == {"torch", "jax"}
    assert all("which has no effect" in f.message for f in report.wrong)


def test_digits_lost_in_float64_are_caught(rng):
    x = rng.normal(size=100) + 1e7

    def spread(x):
        return (x * x).mean() - x.mean() ** 2

    assert not testing.check(spread, inputs=x, rows="numpy", gradients=False)


def test_a_reference_that_is_not_wide_is_refused(x):
    with pytest.raises(ArgumentValueError, match=r"its result is float32 .* pass reference="):
        testing.check(lambda x: x.astype(np.float32) * 2, inputs=x, rows="numpy")


def test_arrays_inside_of_arguments_are_refused(x):
    with pytest.raises(ArgumentTypeError, match=r"inputs\['a'\] has as argument 0 a list"):
        testing.check(lambda many: many[0] * 2, inputs={"a": ([x, x],)}, rows="numpy")


def test_a_write_to_an_integer_array_is_caught_and_the_callers_array_is_safe(x):
    def writes(x, mask):
        mask[...] = False
        return x * 2

    mask = np.ones(4, bool)
    report = testing.check(writes, inputs=(x, mask), rows="numpy")
    assert [f.what for f in report.wrong] == ["input changed"]
    assert mask.all()


def test_integers_are_compared_exactly(x):
    def function(x):
        return x, np.argmax(x) + (x.dtype == np.float32)

    report = testing.check(function, inputs=x, rows="numpy", units="ulp", bound=4)
    assert [f.where for f in report.wrong] == ["result[1]"]


def test_every_cotangent_counts(x):
    """None is 0: whatever the seed, a gradient that is twice as large is wrong."""
    for seed in range(100):
        report = testing.check(
            total, inputs=x, vjp=lambda x, dy: 4 * x * dy, rows="numpy", seed=seed, elements=4
        )
        assert not report


# What is raised, and what is refused -------------------------------------------------------------


def test_what_is_raised_while_results_are_fetched_is_reported(x):
    class Late(testing.Row):
        """Fails when its results are fetched, as GPUs and Dask do."""

        why_absent = None
        library = "numpy"

        def asarray(self, a):
            return a.copy()

        def to_numpy(self, y):
            raise RuntimeError("out of memory\nand more")

    report = testing.check(lambda x: 2 * x, inputs=x, rows=[Late("numpy:late")])
    assert [f.message for f in report.wrong] == ["RuntimeError: out of memory"]
    with pytest.raises(testing.Disagreement) as raised:
        report.raise_if_wrong()
    assert isinstance(raised.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": "ulps"}, "units='ulps' is not known"),
        ({"elements": 0}, "elements=0 is not an integer from 1"),
        ({"elements": "all"}, "elements='all'"),
        ({"seed": -1}, "seed=-1"),
        ({"bound": "1e-6"}, "bound='1e-6' is not a number"),
        ({"gradient_bound": -1}, "gradient_bound=-1"),
        ({"dtype": "flaot32"}, "dtype='flaot32' is not a dtype's name"),
        ({"gradients": 1}, "gradients=1 is neither"),
        ({"without": ["dask"]}, r"without=\['dask'\] has no reasons"),
        ({"rows": 3}, "rows=3 are not rows"),
        ({"rows": []}, r"rows=\[\] has no row"),
        ({"reference": 3}, "reference=3 cannot be called"),
        ({"reference_vjp": lambda x, dy: x[:1]}, "reference_vjp: it returned arrays of the shapes"),
        ({"function": {"jaxx": total, "numpy": total}}, "function has the key 'jaxx'"),
    ],
)
def test_arguments_that_are_refused(arguments, message, x):
    given = {"function": total, "rows": "torch", **arguments}
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match=message):
        testing.check(**given, inputs=x)


def test_a_row_that_is_absent_is_refused_as_an_object(x):
    class Absent(testing.Row):
        """Of a library that nobody has."""

    with pytest.raises(ArgumentValueError, match="cannot be used here: nobody_has_this is not"):
        testing.check(total, inputs=x, rows=[Absent("nobody_has_this")])
    with pytest.raises(ArgumentTypeError, match="is not a Row"):
        testing.register_row("numpy")
