#!/usr/bin/env bash
# The first run on a GPU machine: what works, what is wrong, how fast it is; the most valuable facts first.
#
#   bash benchmarks/first_gpu_run.sh     from the root of the repository (the folder of pyproject.toml)
#
# Wheels that the machine lacks lie in .whl/ there, which git ignores (array_api_compat is needed, jax_triton of use):
#   python3 -m pip download --no-deps -d .whl array-api-compat==1.16.0 jax-triton==0.3.1
# OUT is where everything is written while it happens (default ./first_run_out), in at most 8 files:
#   log.txt       all that was printed          facts.jsonl  a line of JSON for each fact
#   failures.txt  each failing test, at once    steps.txt    what ran, for how long, how it ended
#   bench/        the benchmark's records, as they are made, and its JSON
# LIMIT is for all of it, in seconds (default 520). A step that fails or hangs does not stop the next.
# STEPS chooses and orders: "versions torch cupy jax own rows bench" is the default. There are also
# "all", every test of PyTorch and CuPy marked gpu, and "sanitize", a few calls under
# compute-sanitizer, each array in memory of its own.
# FIRST_RUN_DRY=1 tries the script out where there is no GPU.
set -u
ROOT=$PWD
[ -f "$ROOT/pyproject.toml" ] && [ -d "$ROOT/backends" ] || { echo "run this from the project's root"; exit 2; }
OUT=${OUT:-$ROOT/first_run_out}; mkdir -p "$OUT"
LIMIT=${LIMIT:-520}
STEPS=${STEPS:-versions torch cupy jax own rows bench}
WORK=$(mktemp -d)
PY=${PY:-python3}
SECONDS=0
: >"$OUT/steps.txt"; : >"$OUT/facts.jsonl"

site=$WORK/site; mkdir -p "$site"
if ls "$ROOT"/.whl/*.whl >/dev/null 2>&1; then
  $PY -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$ROOT"/.whl/*.whl ||
    for wheel in "$ROOT"/.whl/*.whl; do $PY -m zipfile -e "$wheel" "$site"; done
fi
export OUT WORK ROOT PYTHONPATH="$ROOT:$site:$WORK${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# JAX would take three quarters of the memory at once, from whoever comes next.
export XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_TRACEBACK_FILTERING=off TF_CPP_MIN_LOG_LEVEL=2

step() { # NAME SECONDS COMMAND...: run it for so long at most, and go on whatever happens
  local name=$1 most=$2 left=$((LIMIT - SECONDS)) begun=$SECONDS status
  shift 2
  if [ "$left" -lt 12 ]; then echo "$name: no time was left" | tee -a "$OUT/steps.txt"; return; fi
  [ "$most" -gt "$left" ] && most=$left
  echo; echo "==== $name (at most ${most} s, ${left} s left)"
  timeout -s INT -k 8 "$most" "$@"
  status=$?
  echo "$name: status $status after $((SECONDS - begun)) s" | tee -a "$OUT/steps.txt"
}

# ---- what the three smoke programs share ---------------------------------------------------------

cat >"$WORK/smoke.py" <<'PYTHON'
import json, os, sys, time, traceback
import numpy as np

DRY = bool(os.environ.get("FIRST_RUN_DRY"))
IMPLEMENTATION = None if DRY else "fused"
BEGUN = time.time()
LIBRARY = os.path.basename(sys.argv[0]).removeprefix("smoke_").removesuffix(".py")


def fact(name, /, **values):
    record = {"library": LIBRARY, "fact": name, "at": round(time.time() - BEGUN, 1), **values}
    with open(os.path.join(os.environ["OUT"], "facts.jsonl"), "a") as file:
        file.write(json.dumps(record, default=str) + "\n")
    print(f"[{record['at']:6.1f}] {name}: " + ", ".join(f"{k} {v}" for k, v in values.items()), flush=True)


def attempt(name, function):
    try:
        return function()
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()
        fact(f"FAILED {name}", error=f"{type(error).__name__}: {str(error)[:300]}")
        print("\n".join(lines[-14:]), flush=True)


# (N, C, *space), groups, layout, dtype, offset, mask, activation: each plan of the kernels, both
# layouts, odd sizes, groups that are merged by a kernel of their own (the two of 300x300).
CASES = [
    ((4, 64, 16, 16), 8, "first", "float32", 0.0, False, None),
    ((4, 64, 16, 16), 8, "last", "float32", 0.0, False, "silu"),
    ((2, 64, 96, 80), 4, "first", "float32", 0.0, False, "silu"),
    ((2, 64, 96, 80), 4, "last", "float32", 0.0, False, None),
    ((1, 32, 300, 300), 2, "first", "float32", 0.0, False, None),
    ((1, 32, 300, 300), 2, "last", "float32", 0.0, False, "silu"),
    ((3, 30, 7, 9), 3, "first", "float32", 1e3, True, None),
    ((3, 30, 7, 9), 3, "last", "float32", 1e3, True, "gelu"),
    ((2, 64, 96, 80), 4, "first", "float32", 1e5, False, None),
    ((2, 64, 96, 80), 4, "last", "float32", 1e5, False, None),
    ((2, 320, 32, 32), 32, "first", "bfloat16", 0.0, False, "silu"),
    ((2, 320, 32, 32), 32, "last", "bfloat16", 0.0, False, "silu"),
    ((2, 64, 96, 80), 4, "last", "float16", 0.0, True, "silu"),
]
EPS = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def name_of(case):
    shape, groups, layout, dtype, offset, mask, act = case
    return f"{'x'.join(map(str, shape))} g{groups} {layout} {dtype} offset {offset:g}{' mask' if mask else ''} {act or '-'}"


def rounded(a, dtype):
    if dtype == "bfloat16":
        bits = a.astype(np.float32).view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (bits & np.uint32(0xFFFF0000)).view(np.float32)
    return a.astype(dtype).astype(np.float32)


def inputs(case):
    """Float32 arrays of NumPy, channels first, whose values the dtype holds; the mask or None."""
    shape, _, _, dtype, offset, mask, _ = case
    rng = np.random.default_rng()  # fresh numbers in every run
    x = rng.standard_normal(shape, np.float32) + np.float32(offset)
    dy = rng.standard_normal(shape, np.float32)
    scale, bias = rng.standard_normal((2, shape[1])).astype(np.float32)
    valid = rng.random((shape[0], 1, *shape[2:])) < 0.7 if mask else None
    return *(rounded(a, dtype) for a in (x, dy, scale, bias)), valid


def reference(case, x, dy, scale, bias, valid):
    """y and the gradients of x, scale and bias in float64, from the definition."""
    shape, groups, _, _, _, _, act = case
    apart, each = (shape[0], groups, shape[1] // groups, -1), (1, groups, shape[1] // groups, 1)
    x, dy = (a.astype(np.float64).reshape(apart) for a in (x, dy))
    scale, bias = (a.astype(np.float64).reshape(each) for a in (scale, bias))
    weight = np.broadcast_to(1.0 if valid is None else valid, shape).reshape(apart)
    total = lambda a: a.sum((2, 3), keepdims=True)
    count = total(weight)
    std = np.sqrt(total((x - (mean := total(x * weight) / count)) ** 2 * weight) / count + 1e-6)
    hat = (x - mean) / std
    y = hat * scale + bias
    if act == "silu":
        s = 1 / (1 + np.exp(-y))
        dy, y = dy * s * (1 + y * (1 - s)), y * s
    elif act == "gelu":
        import math
        cdf = 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        dy, y = dy * (cdf + y * np.exp(-y * y / 2) / math.sqrt(2 * math.pi)), y * cdf
    d = dy * scale
    dx = (d - weight * (total(d) + hat * total(d * hat)) / count) / std
    return y.reshape(shape), dx.reshape(shape), (dy * hat).sum((0, 3)).ravel(), dy.sum((0, 3)).ravel()


def compare(case, found, given):
    """Record the largest errors of y, dx, dscale and dbias (NumPy, channels first)."""
    want = reference(case, *given)
    errors = []
    for i, (ours, true) in enumerate(zip(found, want)):
        ours = np.asarray(ours, np.float64).reshape(true.shape)
        size = np.maximum(1, abs(true)) if i == 0 else abs(true).max()
        errors.append(float(np.max(abs(ours - true) / size)))
    last, offset = EPS[case[3]], case[4]
    slope = {0.0: 2e-6, 1e3: 1e-4}.get(offset, 1e-2)
    right = errors[0] <= max(5e-6, last) and all(e <= max(slope, last) for e in errors[1:])
    fact(("right " if right else "WRONG ") + name_of(case),
         **{n: f"{e:.1e}" for n, e in zip(("y", "dx", "dscale", "dbias"), errors)})
    return right


def options(case):
    return {"num_groups": case[1], "epsilon": 1e-6, "activation": case[6], "dtype": "input",
            "implementation": IMPLEMENTATION}
PYTHON

# ---- PyTorch -------------------------------------------------------------------------------------

cat >"$WORK/smoke_torch.py" <<'PYTHON'
import math, time
from smoke import *
import torch
fact("imported", torch=torch.__version__, cuda=torch.version.cuda)
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU and not DRY:
    sys.exit("PyTorch finds no GPU")
from groupnorm import GroupNorm, group_norm, group_norm_vjp
from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.grouped_shape import GroupedShape
from groupnorm.backends.torch import gpu as torch_gpu

if GPU:
    p = torch.cuda.get_device_properties(0)
    fact("device", name=p.name, capability=f"{p.major}.{p.minor}", processors=p.multi_processor_count,
         l2_mb=round(p.L2_cache_size / 1e6), memory_gb=round(p.total_memory / 1e9))
begun = time.time()
fact("kernels", unavailable=torch_gpu.GpuEngine().why_unavailable(torch.device("cuda", 0)), seconds=round(time.time() - begun, 1))


def put(a, case):
    a = torch.tensor(a, device=DEVICE).to(getattr(torch, case[3]))
    return a.contiguous(memory_format=torch.channels_last) if case[2] == "last" and a.ndim == 4 else a


def host(a):
    return a.detach().float().cpu().numpy()


def check(case):
    given = inputs(case)
    x, dy, scale, bias = (put(a, case) for a in given[:4])
    mask = None if given[4] is None else torch.tensor(given[4], device=DEVICE)
    runs = []
    # What is not written shows as NaN.
    torch.use_deterministic_algorithms(GPU)
    for _ in range(2):
        y, pullback = group_norm_vjp(x, scale, bias, mask=mask, feature_axis=1, **options(case))
        runs.append((y, *pullback(dy)))
    torch.use_deterministic_algorithms(False)
    strides = [[s for s, n in zip(a.stride(), a.shape) if n > 1] for a in (y, x)]
    assert strides[0] == strides[1], strides
    compare(case, map(host, runs[0]), given)
    if not all(torch.equal(a, b) for a, b in zip(*runs)):
        fact("WRONG other bits when repeated " + name_of(case))


for case in CASES:
    attempt(name_of(case), lambda: check(case))


def layer_and_input(shape=(3, 64, 40, 36), **others):
    torch.manual_seed(1)
    layer = GroupNorm((shape[1], ...), feature_axis=0, num_groups=8, activation="silu", backend="torch",
                      implementation=IMPLEMENTATION, **others).to(DEVICE)
    with torch.no_grad():
        layer.weight.normal_(); layer.bias.normal_()
    return layer, torch.randn(shape, device=DEVICE)


def autograd():
    layer, x = layer_and_input()
    x.requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
    z = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 8, layer.weight.double(), layer.bias.double(), 1e-6))
    want = torch.autograd.grad(z, (x, layer.weight, layer.bias), dy.double())
    worst = max(float(((a - b).abs().max() / b.abs().max())) for a, b in zip(found, want))
    fact("right autograd" if worst < 1e-5 else "WRONG autograd", worst=f"{worst:.1e}")


def compiled():
    layer, x = layer_and_input()
    x.requires_grad_()
    dy = torch.randn_like(x)
    def both(f):
        y = f(x)
        return (y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy))
    eager = both(layer)
    begun = time.time()
    made = both(torch.compile(layer, fullgraph=True))
    same = [torch.equal(a, b) for a, b in zip(made, eager)]
    # Other bits: then portable code was compiled, and not the kernels called.
    fact("right torch.compile" if all(same) else "WRONG torch.compile does not call the kernels", equal=same,
         largest=[f"{float((a - b).abs().max()):.1e}" for a, b in zip(made, eager)], seconds=round(time.time() - begun, 1))


def graph():
    layer, x = layer_and_input(dtype="input")
    dy = torch.randn_like(x)
    x.requires_grad_()
    def both():
        y = layer(x)
        return (y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        kept = both()
    with torch.no_grad():
        x.copy_(torch.randn_like(x) * 3 + 7)
    made.replay()
    torch.cuda.synchronize()
    same = [torch.equal(a, b) for a, b in zip(kept, both())]
    fact("right CUDA graph" if all(same) else "WRONG CUDA graph", equal=same)


def stream():
    layer, x = layer_and_input()
    want = layer(x)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        y = layer(x)
    other.synchronize()
    fact("right other stream" if torch.equal(y, want) else "WRONG other stream")


attempt("autograd", autograd)
attempt("torch.compile", compiled)
if GPU:
    attempt("CUDA graph", graph)
    attempt("other stream", stream)

# How fast ------------------------------------------------------------------------------------------


def replayed(call, count, rounds=9):
    """Median microseconds of one call, of a graph of `count` calls on as many buffers."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(count, 2)):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        kept = [call(i) for i in range(count)]
    times = []
    for _ in range(rounds):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(); a.record(); made.replay(); made.replay(); b.record(); b.synchronize()
        times.append(1e3 * a.elapsed_time(b) / 2 / count)
    del kept
    return sorted(times)[rounds // 2]


def copies():
    found = {}
    for mb in (5, 20, 50, 270):
        count = max(2, 240 // mb)
        a = [torch.randn(mb * 500_000, device=DEVICE).to(torch.bfloat16) for _ in range(count)]
        b = [torch.empty_like(t) for t in a]
        found[mb] = round(2 * a[0].nbytes / replayed(lambda i: b[i].copy_(a[i]), count) / 1e6, 2)
    fact("copy, TB/s read and written, by MB", **{f"mb{k}": v for k, v in found.items()})
    return found[270]


def host_time():
    layer, x = layer_and_input((2, 320, 32, 32), dtype="input", param_dtype="bfloat16")
    x, native = x.bfloat16(), torch.nn.GroupNorm(8, 320).cuda().bfloat16()
    calls = {"ours": lambda: layer(x), "eager": lambda: torch.nn.functional.silu(native(x))}
    found = {}
    with torch.no_grad():
        for name, call in calls.items():
            for _ in range(20): call()
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(300): call()
            found[name] = round((time.perf_counter() - begun) / 300 * 1e6, 1)
            torch.cuda.synchronize()
    fact("host, us a forward call", **found)


SHAPES = {"UNet 16x320@64x64": (16, 320, 64, 64), "VAE 1x512@256x256": (1, 512, 256, 256),
          "ResNet-50 32x256@56x56": (32, 256, 56, 56), "UNet 2x320@32x32": (2, 320, 32, 32)}
TRAFFIC = {("forward", "whole"): 2, ("forward", "measure"): 1, ("forward", "apply"): 2,
           ("backward", "whole"): 3, ("backward", "measure"): 2, ("backward", "apply"): 3}


def kernels(name, first, speed):
    """Microseconds of every kernel by itself, of the passes with and without waves, and of eager's."""
    n, c, *space = SHAPES[name]
    form = GroupedShape(n, 32, c // 32, math.prod(space), first, 2)
    asked = gpu.KernelOptions(1e-6, "silu", None, True, True, False)
    size = 2 * n * c * math.prod(space)
    count = min(max(2, -(-120_000_000 // size)), 40)
    dims = (n, c, *space) if first else (n, *space, c)
    new = lambda: torch.randn(dims, device=DEVICE).bfloat16()
    scale, bias = torch.randn(2, c, device=DEVICE).bfloat16()
    sets = []
    for _ in range(count):
        x = new()
        sets.append({"x": x, "y": torch.empty_like(x), "dy": new(), "dx": torch.empty_like(x), "scale": scale,
                     "bias": bias, "mask": None, "dscale": torch.empty(c, device=DEVICE), "dbias": torch.empty(c, device=DEVICE),
                     "statistics": torch.empty(gpu.statistics_shape(form), device=DEVICE)})
    passes = {"forward": (gpu.forward, ("x", "scale", "bias", "mask", "y", "statistics")),
              "backward": (gpu.backward, ("x", "dy", "scale", "bias", "mask", "statistics", "dx", "dscale", "dbias"))}
    layout = "first" if first else "last"
    for task, (plan, names) in passes.items():
        program = plan(form, asked)
        arrays = [{k: s[k] for k in names} for s in sets]
        for a in arrays:
            torch_gpu.run(program, a)  # which leaves what the steps share in the arrays
        row = {}
        for step in program.launches:
            one = gpu.LaunchSequence((step,), ())
            us = replayed(lambda i: torch_gpu.run(one, arrays[i]), count)
            moved = TRAFFIC.get((step.module, step.kernel), 0) * size
            row[f"{step.kernel} (grid {step.grid[0]}, warps {step.warps})"] = f"{us:.1f} us" + (f" {moved / us / 1e6:.2f} TB/s" if moved else "")
        whole = {}
        for waves in (False, True):
            p = plan(form, asked._replace(waves=waves))
            if waves and p == program:
                continue
            whole["waves" if waves else "pass"] = round(replayed(lambda i: torch_gpu.run(p, dict(sets_of(arrays[i], names))), count), 1)
        reads = {"forward": (2, 3), "backward": (3, 5)}[task]
        floors = [round(r * size / speed / 1e6, 1) for r in reads]
        fact(f"{name} {layout} {task}", **row, **whole, floors_one_two_reads=floors)
    w, b = scale, bias
    view = (lambda t: t) if first else (lambda t: t.movedim(-1, 1))
    eager = lambda i: torch.nn.functional.silu(torch.nn.functional.group_norm(view(sets[i]["x"]), 32, w, b, 1e-6))
    fact(f"{name} {layout} eager forward", us=round(replayed(eager, count), 1))


def sets_of(arrays, names):
    return {k: arrays[k] for k in names}


if GPU:
    speed = attempt("copies", copies) or 3.0
    attempt("host time", host_time)
    for name in SHAPES:
        for first in (True, False):
            attempt(f"kernels {name}", lambda: kernels(name, first, speed))
            torch.cuda.empty_cache()
PYTHON

# ---- CuPy ----------------------------------------------------------------------------------------

cat >"$WORK/smoke_cupy.py" <<'PYTHON'
from smoke import *
import cupy
fact("imported", cupy=cupy.__version__)
from groupnorm import GroupNorm, group_norm_vjp
xp = np if DRY else cupy
if not DRY:
    from groupnorm.backends.cupy import gpu as cupy_gpu
    begun = time.time()
    fact("kernels", unavailable=cupy_gpu.why_unavailable(0), seconds=round(time.time() - begun, 1))


def host(a):
    return np.asarray(a if DRY else a.get()).astype(np.float32)


def check(case):
    import ml_dtypes
    given = inputs(case)
    last = case[2] == "last"
    turn = lambda a: np.moveaxis(a, 1, -1) if last and a.ndim > 1 else a
    back = lambda a: np.moveaxis(a, -1, 1) if last and a.ndim > 1 else a
    dtype = ml_dtypes.bfloat16 if case[3] == "bfloat16" else case[3]
    x, dy, scale, bias = (xp.asarray(np.ascontiguousarray(turn(a)).astype(dtype)) for a in given[:4])
    mask = None if given[4] is None else xp.asarray(np.ascontiguousarray(turn(given[4])))
    runs = []
    for _ in range(2):
        y, pullback = group_norm_vjp(x, scale, bias, mask=mask, feature_axis=-1 if last else 1, **options(case))
        runs.append([host(a) for a in (y, *pullback(dy))])
    compare(case, map(back, runs[0]), given)
    if not all(a.tobytes() == b.tobytes() for a, b in zip(*runs)):
        fact("WRONG other bits when repeated " + name_of(case))


if os.environ.get("SANITIZE"):
    cupy.cuda.set_allocator(None)  # so that whatever is read beyond an array's end is seen
    del CASES[6:]
for case in CASES:
    attempt(name_of(case), lambda: check(case))
if os.environ.get("SANITIZE"):
    sys.exit()


def stream_and_graph():
    layer = GroupNorm(64, num_groups=8, backend="cupy", implementation=IMPLEMENTATION)
    x = cupy.random.standard_normal((4, 30, 30, 64), dtype=cupy.float32)
    want = layer(x)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        y = layer(x)
    stream.synchronize()
    fact("right other stream" if bool((y == want).all()) else "WRONG other stream")
    pool = cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        layer(x); stream.synchronize()
        stream.begin_capture()
        y = layer(x)
        made = stream.end_capture()
        x[...] = x * 3 + 7
        made.launch(stream)
        stream.synchronize()
    fact("right CUDA graph" if bool((y == layer(x)).all()) else "WRONG CUDA graph")


if not DRY:
    attempt("stream and graph", stream_and_graph)
PYTHON

# ---- JAX -----------------------------------------------------------------------------------------

cat >"$WORK/smoke_jax.py" <<'PYTHON'
from smoke import *
import jax, jax.numpy as jnp
fact("imported", jax=jax.__version__, backend=jax.default_backend(), devices=jax.devices())
if jax.default_backend() != "gpu" and not DRY:
    sys.exit("JAX finds no GPU")
from groupnorm import group_norm, group_norm_vjp
from groupnorm.backends.jax import cpu as jax_cpu
from groupnorm.backends.jax import gpu as jax_gpu
if not DRY:
    begun = time.time()
    why = jax_gpu.why_unavailable()
    fact("kernels", unavailable=why, launcher=getattr(jax_gpu.chosen_launcher(), "__name__", None), seconds=round(time.time() - begun, 1))
    for launcher in (jax_gpu._by_ptx, jax_gpu._by_jax_triton):
        attempt(launcher.__name__, lambda: (jax_gpu._try(launcher), fact(f"right launcher {launcher.__name__}")))
    fact("kernels for CPUs", unavailable=jax_cpu.why_unavailable(float16=False))


def check(case):
    given = inputs(case)
    last = case[2] == "last"
    turn = lambda a: np.moveaxis(a, 1, -1) if last and a.ndim > 1 else a
    back = lambda a: np.moveaxis(a, -1, 1) if last and a.ndim > 1 else a
    x, dy, scale, bias = (jnp.asarray(turn(a), dtype=case[3]) for a in given[:4])
    mask = None if given[4] is None else jnp.asarray(turn(given[4]))

    @jax.jit
    def both(x, scale, bias, mask, dy):
        y, pullback = group_norm_vjp(x, scale, bias, mask=mask, feature_axis=-1 if last else 1, **options(case))
        return (y, *pullback(dy))

    runs = [[np.asarray(a.astype(jnp.float32)) for a in both(x, scale, bias, mask, dy)] for _ in range(2)]
    compare(case, map(back, runs[0]), given)
    if not all(a.tobytes() == b.tobytes() for a, b in zip(*runs)):
        fact("WRONG other bits when repeated " + name_of(case))


for case in CASES:
    attempt(name_of(case), lambda: check(case))


def transformed():
    x = jax.random.normal(jax.random.key(0), (3, 4, 30, 64))
    f = lambda x: group_norm(x, num_groups=8, activation="silu", implementation=IMPLEMENTATION)
    p = lambda x: group_norm(x, num_groups=8, activation="silu", implementation="portable")
    pairs = {"eager": (f(x), p(x)), "vmap": (jax.vmap(f)(x), jax.vmap(p)(x)),
             "grad": (jax.grad(lambda a: (f(a) ** 2).sum())(x), jax.grad(lambda a: (p(a) ** 2).sum())(x)),
             "jvp": (jax.jvp(f, (x,), (x,))[1], jax.jvp(p, (x,), (x,))[1])}
    for name, (a, b) in pairs.items():
        worst = float(jnp.abs(a - b).max())
        fact(("right " if worst < 2e-5 else "WRONG ") + name, worst=f"{worst:.1e}")


attempt("transformations", transformed)


def speed():
    for layout, shape, axis in (("first", (16, 320, 64, 64), 1), ("last", (16, 64, 64, 320), -1)):
        x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        scale = bias = jnp.ones(320, jnp.bfloat16)
        found = {}
        for name in ("fused", "portable"):
            f = jax.jit(lambda x: group_norm(x, scale, bias, feature_axis=axis, activation="silu", dtype="input", implementation=name))
            jax.block_until_ready(f(x))
            begun = time.perf_counter()
            for _ in range(50): y = f(x)
            jax.block_until_ready(y)
            found[name] = round((time.perf_counter() - begun) / 50 * 1e6, 1)
        fact(f"UNet 16x320@64x64 {layout} forward, us a dispatch", **found)


if not DRY:
    attempt("speed", speed)
PYTHON

# Each failing test is written down when it fails: a run that is cut off must not lose it.
cat >"$WORK/write_failures.py" <<'PYTHON'
import os


def pytest_runtest_logreport(report):
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.path.join(os.environ["OUT"], "failures.txt"), "a") as file:
            text = str(report.longrepr).strip().splitlines()
            file.write(f"==== {report.nodeid} ({report.when})\n" + "\n".join(text[-18:]) + "\n\n")
PYTHON

test_run() { # SECONDS PROCESSES ARGUMENTS...
  local most=$1 many=$2; shift 2
  # The installed pytest and its plugins are the machine's own; only failures matter here.
  step "tests $*" "$most" $PY -m pytest -q --tb=short -rfE -n "$many" -p write_failures -p no:cacheprovider \
    -o minversion=1 -o addopts= -W default "$@"
}

main() {
for name in $STEPS; do
  case $name in
    versions)
      step versions 60 bash -c '
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit --format=csv,noheader
        '"$PY"' - <<PYTHON
import importlib.metadata as m, os, platform, shutil, sysconfig
names = "numpy torch triton jax jaxlib jax-cuda13-plugin jax-triton cupy-cuda13x array-api-compat ml_dtypes flax pytest pytest-xdist hypothesis"
for n in names.split():
    try: print(n, m.version(n), end=", ")
    except Exception: print(n, "IS MISSING", end=", ")
print("Python", platform.python_version(), "cpus", os.cpu_count())
# For torch.compile's own kernels, Triton 3.6 compiles a launcher in C for every kind of arguments.
print("gcc", shutil.which("gcc"), "Python.h", os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))
PYTHON
        git rev-parse --short HEAD; ldconfig -p | grep libcuda.so; '"$PY"' -c "import groupnorm; print(groupnorm.__file__)"' ;;
    torch) step "smoke torch" 150 $PY "$WORK/smoke_torch.py" ;;
    cupy) step "smoke cupy" 60 $PY "$WORK/smoke_cupy.py" ;;
    jax) step "smoke jax" 95 $PY "$WORK/smoke_jax.py" ;;
    sanitize) SANITIZE=1 step sanitize 120 compute-sanitizer --tool memcheck --error-exitcode 9 $PY "$WORK/smoke_cupy.py" ;;
    own) test_run 80 6 -m gpu --backends torch:cuda,jax:gpu,cupy tests/torch/test_gpu.py tests/cupy/test_cupy.py tests/jax/test_gpu.py ;;
    rows) test_run 75 12 -m gpu --backends torch:cuda,cupy tests/portable/test_accuracy.py tests/portable/test_masks.py tests/portable/test_activation.py \
      tests/portable/test_gradients.py tests/portable/test_layouts.py tests/portable/test_dtypes.py ;;
    all) test_run 150 12 -m gpu --backends torch:cuda,cupy tests ;;
    bench)
      most=$((LIMIT - SECONDS - 45)); [ $most -gt 120 ] && most=120
      if [ $most -ge 45 ]; then
        step "benchmark torch" $((most + 40)) $PY benchmarks/gpu.py --quick --only torch --seconds $most --into "$OUT/bench"
      else
        echo "benchmark: no time was left" | tee -a "$OUT/steps.txt"
      fi ;;
    *) echo "no step is called $name" ;;
  esac
done

echo; echo "==== in short"
cat "$OUT/steps.txt"
grep -hoE '"fact": "(WRONG|FAILED)[^"]*".*' "$OUT/facts.jsonl" 2>/dev/null | cut -c1-260 | head -40
echo "right: $(grep -c '"fact": "right' "$OUT/facts.jsonl" 2>/dev/null), wrong: $(grep -c '"fact": "WRONG' "$OUT/facts.jsonl" 2>/dev/null), failed: $(grep -c '"fact": "FAILED' "$OUT/facts.jsonl" 2>/dev/null)"
grep -h '^====' "$OUT/failures.txt" 2>/dev/null | head -30
grep -hE '"fact": "(copy|host|UNet|VAE|ResNet)' "$OUT/facts.jsonl" 2>/dev/null | cut -c1-420
echo "$SECONDS s in all"
}

main 2>&1 | tee "$OUT/log.txt"
