"""Arrays spread over four host devices by their sharding, and named axes of maps within maps.

An array that is sharded needs no axis_name under jit. In an `Auto` mesh the compiler decides what
is exchanged; in an `Explicit` one, as `jax.make_mesh` makes it, types hold the shardings. Either
way the numbers are compared with the oracle, the result must lie where the input lies, and the
collectives of the compiled program are counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from groupnorm import GroupNorm, group_norm, group_norm_vjp, group_statistics, normalize
from groupnorm.errors import (
    ArgumentStateError,
    ArgumentTypeError,
    ArgumentValueError,
    AxisNameError,
)
from groupnorm.testing import oracle
from tests.rows import CONTRACT, GRADIENT, GRADIENT_FAR, assert_close, assert_gradient
from tests.sharding import NUM_GROUPS, Case
from tests.sharding import check as check_case
from tests.sharding import data as data_of_case

pytestmark = pytest.mark.several_jax_devices

SHARDS = 4
OFFSETS = (0.0, 1e3, 1e5)
KINDS = ("Auto", "Explicit")
# Second derivatives, relative to the largest.
SECOND = 1e-5
# Sums are taken axis by axis, and the compiler adds up as soon as one is over the sharded axis:
# what is left after the first axis, with some statistics, is less than this share of a shard.
SMALL = 1 / 3
# The pivot's least, largest and sum, then all sums of deviations together; where the pivot comes
# from a sample, its elements may also move. In backward one more.
FORWARD, BACKWARD = 5, 1


@pytest.fixture(autouse=True)
def four_devices():
    assert jax.device_count() >= SHARDS, "conftest sets XLA_FLAGS before JAX starts"


class Layout(NamedTuple):
    """Where the axes of x lie."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    num_groups: int = 4

    @property
    def feature_axis(self) -> int:
        return self.axes.index("channels")


LAYOUTS = {
    "last": Layout((4, 32, 32, 8), ("batch", "rows", "columns", "channels")),
    "first": Layout((4, 8, 32, 32), ("batch", "channels", "rows", "columns")),
    # Long enough for a pivot to come from a sample, also of one device's part.
    "sequence": Layout((2, 4096, 8), ("batch", "rows", "channels")),
    # Four channels a group, two a device: a group's lie on two devices.
    "last, wide groups": Layout((4, 32, 32, 8), ("batch", "rows", "columns", "channels"), 2),
    "first, wide groups": Layout((4, 8, 32, 32), ("batch", "channels", "rows", "columns"), 2),
    # Four channels a group, three a device: borders of groups and devices do not meet.
    "last, crossing": Layout((4, 32, 32, 12), ("batch", "rows", "columns", "channels"), 3),
}


class Program(NamedTuple):
    """What is compiled once and asked for the numbers at every offset."""

    kind: str
    layout: str
    sharded: tuple[str, ...]  # one axis by all devices, or two by two each
    fast: bool = True
    masked: bool = False

    def __str__(self) -> str:
        how = ("fast" if self.fast else "exact") + (" masked" if self.masked else "")
        return f"{self.kind}-{self.layout}-{'+'.join(self.sharded)}-{how}"

    @property
    def straddles(self) -> bool:
        return self.sharded == ("channels",) and "," in self.layout

    @property
    def forward_collectives(self) -> int:
        """How many a forward may take; twice as many for two axes."""
        return FORWARD * len({"rows", "columns"} & set(self.sharded))

    @property
    def backward_collectives(self) -> int:
        """As many; but parameters are summed over samples, and nothing over channels."""
        return 0 if self.sharded == ("channels",) else BACKWARD * len(self.sharded)


PROGRAMS = [
    *(
        Program("Auto", layout, (axis,), fast, masked)
        for layout, variants in {
            "last": ((True, False), (False, False), (True, True)),
            "first": ((True, False), (False, True)),
        }.items()
        for axis in ("rows", "columns")
        for fast, masked in variants
    ),
    Program("Auto", "last", ("rows",), fast=False, masked=True),
    Program("Auto", "sequence", ("rows",)),
    Program("Auto", "last", ("batch",)),
    Program("Auto", "first", ("batch",), masked=True),
    Program("Auto", "last", ("channels",)),
    Program("Auto", "first", ("channels",), fast=False),
    Program("Auto", "last, wide groups", ("channels",)),
    Program("Auto", "first, wide groups", ("channels",), masked=True),
    Program("Auto", "last, crossing", ("channels",)),
    Program("Auto", "last", ("batch", "rows")),
    Program("Auto", "first", ("rows", "columns"), masked=True),
    *(Program("Explicit", "last", (axis,)) for axis in ("batch", "rows", "columns", "channels")),
    *(
        Program("Explicit", "first", (axis,), masked=True)
        for axis in ("rows", "columns", "channels")
    ),
    Program("Explicit", "sequence", ("rows",), fast=False),
    Program("Explicit", "last, wide groups", ("channels",)),
    Program("Explicit", "first, wide groups", ("channels",), masked=True),
    Program("Explicit", "last, crossing", ("channels",)),
    Program("Explicit", "last", ("batch", "rows")),
    Program("Explicit", "last", ("rows", "columns"), fast=False),
]


def programs(chosen):
    return pytest.mark.parametrize("program", chosen, ids=str)


class Data(NamedTuple):
    """One array, and what the oracle says of it."""

    x: np.ndarray
    dy: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    mask: np.ndarray | None
    y: np.ndarray
    gradients: oracle.Gradients


@functools.cache
def data(name: str, masked: bool, offset: float) -> Data:
    layout = LAYOUTS[name]
    rng = np.random.default_rng(zlib.crc32(f"{name}{masked}{offset}".encode()))
    channels = layout.shape[layout.feature_axis]
    x = (rng.normal(size=layout.shape) + offset).astype(np.float32)
    dy = rng.normal(size=layout.shape).astype(np.float32)
    scale = rng.uniform(0.5, 1.5, channels).astype(np.float32)
    bias = rng.normal(size=channels).astype(np.float32)
    mask = None
    if masked:
        mask = rng.random(layout.shape) < 0.7
        mask = mask.any(axis=layout.feature_axis, keepdims=True) & (
            rng.random(tuple(n if a != "channels" else 1 for n, a in zip(*layout[:2], strict=True)))
            < 0.7
        )
        # One device's part has no valid element at all, and one sample neither.
        rows = layout.axes.index("rows")
        mask[(slice(None),) * rows + (slice(8, 16),)] = False
        mask[1] = False
        x = np.where(mask, x, np.float32(np.nan))
    keywords = {
        "num_groups": layout.num_groups,
        "feature_axis": layout.feature_axis,
        "mask": mask,
    }
    y = oracle.group_norm(x, scale, bias, **keywords)
    return Data(
        x, dy, scale, bias, mask, y, oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    )


@functools.cache
def mesh_of(kind: str, *sizes: int):
    names = ("d",) if len(sizes) == 1 else ("a", "b")
    return jax.make_mesh(sizes, names, axis_types=(getattr(AxisType, kind),) * len(sizes))


def mesh_for(program: Program):
    return mesh_of(program.kind, *((SHARDS,) if len(program.sharded) == 1 else (2, 2)))


def sharding_of(program: Program) -> NamedSharding:
    mesh = mesh_for(program)
    name_of = dict(zip(program.sharded, mesh.axis_names, strict=True))
    return NamedSharding(mesh, P(*(name_of.get(axis) for axis in LAYOUTS[program.layout].axes)))


def in_mesh(program: Program):
    """Under an explicit mesh JAX asks for its context; an automatic one is found by itself."""
    return contextlib.nullcontext() if program.kind == "Auto" else jax.set_mesh(mesh_for(program))


def layer_of(program: Program, whole: Data, **keywords) -> GroupNorm:
    layout = LAYOUTS[program.layout]
    layer = GroupNorm(
        layout.shape[1:],
        feature_axis=layout.feature_axis - 1,
        num_groups=layout.num_groups,
        use_fast_variance=program.fast,
        backend="jax",
        **keywords,
    )
    # Parameters lie as the channels do.
    spec = P(*(n for n in (sharding_of(program).spec[layout.feature_axis],) if n))
    place = functools.partial(jax.device_put, device=NamedSharding(mesh_for(program), spec))
    return jax.tree.unflatten(jax.tree.structure(layer), [place(whole.scale), place(whole.bias)])


def arguments(program: Program, offset: float) -> tuple:
    """Return the layer, x, dy and, where there is one, the mask, on their devices."""
    whole, sharding = data(program.layout, program.masked, offset), sharding_of(program)
    arrays = [jax.device_put(a, sharding) for a in (whole.x, whole.dy)]
    if whole.mask is not None:
        spec = [n if s > 1 else None for n, s in zip(sharding.spec, whole.mask.shape, strict=True)]
        arrays.append(jax.device_put(whole.mask, NamedSharding(sharding.mesh, P(*spec))))
    return layer_of(program, whole), *arrays


def forward(layer, x, dy, *mask):
    return layer(x, *mask)


def both(layer, x, dy, *mask):
    y, pullback = jax.vjp(lambda layer, x: layer(x, *mask), layer, x)
    grads, dx = pullback(dy)
    return y, dx, grads.scale, grads.bias


def both_by_hand(layer, x, dy, *mask):
    """As `both`, by the pullback that the library wrote itself."""
    y, pullback = group_norm_vjp(
        x,
        layer.scale,
        layer.bias,
        mask=mask[0] if mask else None,
        num_groups=layer.num_groups,
        feature_axis=-1,
    )
    return y, *pullback(dy)


def compiled(function, program: Program):
    with in_mesh(program):
        return jax.jit(function).lower(*arguments(program, 0.0)).compile()


def called(function, program: Program, offset: float):
    with in_mesh(program):
        return function(*arguments(program, offset))


def check(program: Program, offset: float, y, dx, dscale, dbias) -> None:
    whole, sharding = data(program.layout, program.masked, offset), sharding_of(program)
    for result in (y, dx):
        assert result.dtype == np.float32
        assert result.sharding.is_equivalent_to(sharding, result.ndim), result.sharding
        if program.kind == "Explicit":
            assert jax.typeof(result).sharding.spec == sharding.spec
    assert_close(np.asarray(y), whole.y, tolerance=CONTRACT)
    rtol = GRADIENT if offset == 0 else GRADIENT_FAR
    if offset <= 1e3:  # the accuracy contract of gradients says nothing beyond
        assert_gradient(np.asarray(dx), whole.gradients.x, rtol=rtol)
        assert_gradient(np.asarray(dscale), whole.gradients.scale, rtol=rtol)
    assert_gradient(np.asarray(dbias), whole.gradients.bias, rtol=rtol)


class Collective(NamedTuple):
    """One exchange of a compiled program, and how many numbers it leaves on a device."""

    name: str
    numbers: int


def collectives(executable) -> list[Collective]:
    names = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|ragged-all"
    names += "|reduce-scatter"
    found = re.findall(rf" = (\S.*?) ({names})[\w-]*\(", executable.as_text())
    return [
        Collective(name, sum(_product(sizes) for sizes in re.findall(r"\w+\[([\d,]*)\]", result)))
        for result, name in found
    ]


def _product(sizes: str) -> int:
    return math.prod(int(size) for size in sizes.split(",") if size)


def test_collectives_are_found():
    """The control: a sum over the sharded axis, and data that is brought together."""
    sharding = NamedSharding(mesh_of("Auto", SHARDS), P(None, "d"))
    x = jax.device_put(np.ones((4, 32), np.float32), sharding)
    summed = jax.jit(lambda x: x.sum(axis=1)).lower(x).compile()
    assert collectives(summed) == [Collective("all-reduce", 4)]
    everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, P()))
    assert collectives(everywhere.lower(x).compile()) == [Collective("all-gather", 128)]


def assert_collectives(program: Program, executable, most: int | None) -> None:
    found = collectives(executable)
    limit = SMALL * math.prod(LAYOUTS[program.layout].shape) / SHARDS
    assert not [each for each in found if each.numbers > limit], f"data is exchanged: {found}"
    assert most is None or len(found) <= most, found


@programs(PROGRAMS)
def test_sharded_array_needs_no_axis_name(program, subtests):
    executable = compiled(both, program)
    for offset in OFFSETS:
        with subtests.test("numbers and place", offset=offset):
            check(program, offset, *called(executable, program, offset))
    with subtests.test("collectives"):
        most = program.forward_collectives + program.backward_collectives
        # Where a group's channels lie on several devices, all that is promised is that data stays.
        assert_collectives(program, executable, None if program.straddles else most)


@programs(
    [
        *(Program("Auto", "last", ("rows",), fast=fast) for fast in (True, False)),
        Program("Auto", "last", ("columns",)),
        Program("Auto", "last", ("rows",), masked=True),
        Program("Auto", "sequence", ("rows",)),
        Program("Explicit", "first", ("columns",)),
    ]
)
def test_collectives_of_the_forward(program):
    assert_collectives(program, compiled(forward, program), program.forward_collectives)


@programs([Program("Auto", "last", (axis,)) for axis in ("rows", "channels")])
def test_own_pullback(program):
    executable = compiled(both_by_hand, program)
    for offset in (0.0, 1e3):
        check(program, offset, *called(executable, program, offset))


def test_own_pullback_of_an_explicit_sharding_is_refused():
    program = Program("Explicit", "last", ("rows",))
    with pytest.raises(ArgumentTypeError, match="is sharded over several devices by its type"):
        called(both_by_hand, program, 0.0)


def test_values_and_own_pullback_of_what_lies_everywhere():
    """In an explicit mesh too: only what is sharded is refused."""
    program = Program("Explicit", "last", ("rows",))
    whole = data("last", False, 1e3)
    x = jax.device_put(whole.x, NamedSharding(mesh_for(program), P()))

    @jax.jit
    def both(x, dy):
        y, pullback = group_norm_vjp(x, num_groups=4)
        by_values = normalize(x, group_statistics(x, num_groups=4), num_groups=4)
        return y, by_values, pullback(dy).x

    with in_mesh(program):
        y, by_values, dx = both(x, whole.dy)
    want = oracle.group_norm(whole.x, num_groups=4)
    for got in (y, by_values):
        assert_close(np.asarray(got), want, tolerance=CONTRACT)
    gradients = oracle.group_norm_gradients(whole.x, whole.dy, None, None, num_groups=4)
    assert_gradient(np.asarray(dx), gradients.x, rtol=GRADIENT_FAR)


@programs([Program(kind, "last", ("rows",)) for kind in KINDS])
def test_eager(program):
    layer, x, *_ = arguments(program, 1e3)
    with in_mesh(program):
        y = layer(x)
    assert y.sharding.is_equivalent_to(x.sharding, x.ndim)
    assert_close(np.asarray(y), data("last", False, 1e3).y, tolerance=CONTRACT)


@pytest.mark.parametrize("how", ["in_shardings", "constraint"])
def test_sharding_that_only_the_compiled_function_knows(how):
    program = Program("Auto", "last", ("rows" if how == "in_shardings" else "columns",))
    whole, sharding = data("last", False, 1e3), sharding_of(program)
    layer = layer_of(program, whole)
    if how == "in_shardings":
        function = jax.jit(lambda x: layer(x), in_shardings=sharding)
    else:
        function = jax.jit(lambda x: layer(jax.lax.with_sharding_constraint(x, sharding)))
    y = function(whole.x)
    assert y.sharding.is_equivalent_to(sharding, y.ndim)
    assert_close(np.asarray(y), whole.y, tolerance=CONTRACT)


@programs([Program(kind, "last", (axis,)) for kind in KINDS for axis in ("batch", "rows")])
def test_vmap_over_a_sharded_axis_and_beside_it(program):
    whole = data("last", False, 0.0)
    layer, x, *_ = arguments(program, 0.0)
    both_samples = jnp.stack([x, x])
    with in_mesh(program):
        y = jax.jit(jax.vmap(lambda x: layer(x)))(both_samples)
        # A sample alone: (rows, columns, channels), in which the first axis is the batch.
        each = jax.jit(jax.vmap(lambda x: layer(x[None])[0]))(x)
    for got in (y[0], y[1], each):
        assert_close(np.asarray(got), whole.y, tolerance=CONTRACT)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_that_are_no_jax_arrays(kind):
    """They are checked and used as they are beside any other x."""
    program = Program(kind, "sequence", ("rows",))
    x = arguments(program, 0.0)[1]
    mask = np.arange(x.shape[1])[:, None] % 3 > 0
    want = oracle.group_norm(np.asarray(x), num_groups=4, mask=mask)
    in_groups = functools.partial(group_norm, num_groups=4)
    with in_mesh(program):
        for given in (mask, mask.tolist()):
            y = jax.jit(lambda x, given=given: in_groups(x, mask=given))(x)
            assert_close(np.asarray(y), want, tolerance=CONTRACT)
        for wrong, error in (
            (np.ma.masked_array(mask), ArgumentTypeError),
            (2 * mask, ArgumentValueError),
            ("all", ArgumentTypeError),
        ):
            with pytest.raises(error, match="mask"):
                in_groups(x, mask=wrong)


@pytest.mark.parametrize("name", ["x", "scale", "bias", "mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_deleted_arrays(kind, name):
    program = Program(kind, "sequence", ("rows",))
    x = arguments(program, 0.0)[1]
    with in_mesh(program):
        given = {
            "x": x,
            "scale": jnp.ones(x.shape[-1]),
            "bias": jnp.zeros(x.shape[-1]),
            "mask": jnp.ones((x.shape[1], 1), bool),
        }
        given[name] = given[name].copy()
        given[name].delete()
        with pytest.raises(ArgumentStateError, match=f"^{name} has shape"):
            group_norm(**given, num_groups=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiler", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_padding_that_is_nan_raises_no_alarm(compiler, kind):
    program = Program(kind, "sequence", ("rows",))
    x = arguments(program, 0.0)[1]
    mask = np.arange(x.shape[1])[:, None] % 3 > 0
    host = np.where(mask, np.array(x), np.nan)
    with in_mesh(program):
        padded = jax.device_put(host, x.sharding)
        call = compiler(lambda x: group_norm(x, num_groups=4, mask=jnp.asarray(mask)))
        with jax.debug_nans(True):
            y = call(padded)
    want = oracle.group_norm(host, num_groups=4, mask=mask)
    assert_close(np.where(mask, y, 0), np.where(mask, want, 0), tolerance=CONTRACT)


# Maps within maps, and maps beside the compiler's own sharding ------------------------------------

LANES = 2  # in each of the four shards
NESTED = Case("nested maps", (5, 2, 3, 1, 4, 1, 2, 5), "shard 1", 100.0)
POOLED = {
    ("shards", "lanes"): None,
    "lanes": tuple((2 * i, 2 * i + 1) for i in range(SHARDS)),
    "shards": tuple(tuple(range(lane, SHARDS * LANES, LANES)) for lane in range(LANES)),
}


def blocks_of(case: Case):
    """Return the layer's parameters, and (shard, lane, N, longest, C) arrays: x, dy and mask."""
    whole = data_of_case(case)
    arrays = (
        case.padded(whole.x, np.nan),
        case.padded(whole.dy, 0),
        case.padded(whole.mask, False),
    )
    return (whole.scale, whole.bias), *(
        jnp.asarray(a.reshape(SHARDS, LANES, *a.shape[1:])) for a in arrays
    )


def over_shards(kind: str, function):
    """Map function(parameters, *blocks) over the leading axis, named shards."""

    def mapped(parameters, *blocks):
        if kind == "pmap":
            in_axes = (None, *(0 for _ in blocks))
            return jax.pmap(function, axis_name="shards", in_axes=in_axes)(parameters, *blocks)

        def on_block(parameters, *blocks):
            return jax.tree.map(lambda a: a[None], function(parameters, *(b[0] for b in blocks)))

        return jax.shard_map(
            on_block,
            mesh=jax.make_mesh((SHARDS,), ("shards",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), *(P("shards") for _ in blocks)),
            out_specs=P("shards"),
            check_vma=kind != "shard_map unchecked",
        )(parameters, *blocks)

    return mapped


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        # JAX itself cannot sum over a vmap's axis inside a shard_map that checks.
        ("shard_map", "shards"),
        *(("shard_map unchecked", names) for names in ("lanes", "shards")),
        ("shard_map unchecked", ("shards", "lanes")),
        ("pmap", ("shards", "lanes")),
    ],
    ids=str,
)
def test_vmap_inside_another_map(kind, names):
    case = dataclasses.replace(NESTED, index_groups=POOLED[names])
    parameters, x, dy, mask = blocks_of(case)

    def forward(parameters, x):
        def on_lane(x, mask):
            return group_norm(x, *parameters, mask=mask, axis_name=names, **case.keywords)

        lanes = jax.vmap(on_lane, axis_name="lanes")
        return over_shards(kind, lambda parameters, *blocks: lanes(*blocks))(parameters, x, mask)

    @jax.jit
    def both(parameters, x, dy):
        y, pullback = jax.vjp(forward, parameters, x)
        return y, *pullback(dy)

    y, (dscale, dbias), dx = both(parameters, x, dy)
    y, dx = (np.asarray(a).reshape(-1, *a.shape[2:]) for a in (y, dx))
    check_case(case, case.unpadded(y), case.unpadded(dx), np.asarray(dscale), np.asarray(dbias))


def test_one_name_of_several_is_bound_nowhere():
    """A pmap has one name; a tuple needs another map for the other."""
    with pytest.raises(AxisNameError, match="lanes"):
        jax.pmap(
            lambda x: group_norm(x, num_groups=2, axis_name=("shards", "lanes")),
            axis_name="shards",
        )(jnp.ones((SHARDS, 2, 3, 4)))


@pytest.mark.parametrize("each", [False, True], ids=["", "vmap"])
@programs([Program(kind, "last", (a, "rows")) for kind in KINDS for a in ("batch", "columns")])
def test_named_axis_beside_one_that_is_not_mapped(program, each):
    """Samples or columns are spread by their sharding alone, rows over a mapped axis."""

    def normalized(layer, x):
        return jax.vmap(lambda x: layer(x[None])[0])(x) if each else layer(x)

    def both(layer, x, dy):
        mapped = jax.shard_map(
            normalized,
            mesh=mesh_for(program),
            in_specs=(P(), P(None, "b")),
            out_specs=P(None, "b"),
            axis_names={"b"},
        )
        y, pullback = jax.vjp(mapped, layer, x)
        grads, dx = pullback(dy)
        return y, dx, grads.scale, grads.bias

    whole = data("last", False, 1e3)
    _, x, dy = arguments(program, 1e3)
    with in_mesh(program):
        results = jax.jit(both)(layer_of(program, whole, axis_name="b"), x, dy)
    check(program, 1e3, *results)


def textbook(x, scale, bias):
    parts = x.reshape(*x.shape[:2], NUM_GROUPS, -1)
    mean = parts.mean(axis=(1, 3), keepdims=True)
    variance = ((parts - mean) ** 2).mean(axis=(1, 3), keepdims=True)
    return ((parts - mean) / jnp.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("kind", ["shard_map", "shard_map unchecked"])
def test_derivative_of_the_gradient(kind, where):
    """A Hessian times a vector, of a loss that bends, against float64 on the whole array."""
    case = Case("twice", (3, 3, 3, 3))
    whole = data_of_case(case)
    parameters = (whole.scale, whole.bias)
    along = np.random.default_rng(0).normal(size=whole.x.shape).astype(np.float32)

    def curvature(function, x, dy, along):
        def loss(x):
            return (dy * function(x) ** 2).sum()

        return jax.jvp(jax.grad(loss), (x,), (along,))[1]

    with jax.enable_x64(True):
        arrays = [jnp.asarray(a, dtype=jnp.float64) for a in (whole.x, whole.dy, along)]
        whole_curvature = functools.partial(curvature, lambda x: textbook(x, *parameters))
        want = np.asarray(jax.jit(whole_curvature)(*arrays))

    def on_shard(parameters, x):
        return group_norm(x, *parameters, axis_name="shards", **case.keywords)

    blocks = [jnp.asarray(case.padded(a, 0)) for a in (whole.x, whole.dy, along)]
    if where == "outside":
        got = jax.jit(
            lambda *blocks: curvature(lambda x: over_shards(kind, on_shard)(parameters, x), *blocks)
        )(*blocks)
    else:
        mapped = over_shards(
            kind,
            lambda parameters, *block: curvature(lambda x: on_shard(parameters, x), *block),
        )
        got = jax.jit(mapped)(parameters, *blocks)
    on_one_device = functools.partial(
        curvature, lambda x: group_norm(x, *parameters, **case.keywords)
    )
    alone = jax.jit(on_one_device)(whole.x, whole.dy, along)
    assert_gradient(np.asarray(alone), want, rtol=SECOND)
    assert_gradient(case.unpadded(np.asarray(got)), want, rtol=SECOND)
