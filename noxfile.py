"""All checks and tasks of this repository: `nox -l` lists them, `nox -s NAME -- ARGS` runs one."""

import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"  # pip finds a CPU build of torch where uv does not
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["quick", "lint", "types", "tests"]
nox.options.error_on_missing_interpreters = True

PYPROJECT = nox.project.load_toml("pyproject.toml")
LOWEST = [
    requirement.replace(">=", "==") + ".*" for requirement in PYPROJECT["project"]["dependencies"]
]
MAX_TEST_PROCESSES = 4  # each imports every framework, which takes about 1 GB
QUIET_SKIPS = ("-r", "fE")  # do not report skips where backends are excluded on purpose
PURE_BACKENDS = "numpy,array_api_strict"  # installed in seconds
# The kernels' own tests, and the tests whose PyTorch rows Triton's kernels must pass.
INTERPRETED = [
    "tests/kernels/test_gpu_interpreted.py",
    *(
        f"tests/portable/test_{name}.py"
        for name in ("accuracy", "activation", "dtypes", "empty", "gradients", "layouts", "masks")
    ),
]
# Their results do not depend on the number of JAX's devices: they set it, start processes of their
# own, or use none.
ANY_DEVICES = [
    "tests/api/test_imports.py",
    "tests/distributed",
    "tests/onnx",
    "tests/peers",
    *(f"tests/jax/test_{name}.py" for name in ("cpu_kernels", "export", "internals", "primitives")),
]
# What the versions of a GPU machine's packages may break: libraries, and tests that need no GPU.
# Triton 3.6 cannot interpret with NumPy 2.5, so that only what it compiles is tested.
GPU_STACK = [
    ("torch,numpy", ["tests/torch"]),
    ("jax,flax,equinox,optax", ["tests/jax", "tests/peers"]),
    ("cupy,numpy", ["tests/cupy"]),
    (
        "numpy",
        [f"tests/kernels/test_gpu_{name}.py" for name in ("compiled", "driver", "probe", "tiling")],
    ),
]
# What new releases break, in a few minutes; `-- tests` runs the whole suite. Not tests/peers: each
# new release may change what these state of other libraries.
NEWEST = [
    "tests/api",
    "tests/jax",
    *(f"tests/portable/test_{name}.py" for name in ("accuracy", "gradients")),
]
# What finds a file that a wheel lacks, or has in another place.
WHEEL = ["tests/api", "tests/kernels/test_cpu.py", "tests/onnx", "tests/portable/test_accuracy.py"]
# Removed from copies of the repository, so that what is installed is tested.
SOURCES = ("groupnorm", "backends", "pytest_groupnorm.py")
# The libraries of sanitizers, which must be loaded first, their options, and what runs under them.
SANITIZERS = {
    "address,undefined": (
        ("libasan.so", "libubsan.so", "libstdc++.so"),  # the last so that exceptions are seen
        # Python keeps much until its end, on purpose.
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"},
        [
            "kernels",
            "portable/test_accuracy.py",
            "portable/test_layouts.py",
            "portable/test_masks.py",
        ],
    ),
    "thread": (
        ("libtsan.so",),
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1"},  # ours alone
        ["kernels/test_core_threads.py"],
    ),
}


def python(version: str) -> str:
    """Return the newest Python of this version that pyenv has, or the version, for nox to find it.

    Most of those that pyenv has are not on the path.
    """
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = {
        int(path.parts[-3].rpartition(".")[2]): str(path)
        for path in root.glob(f"versions/{version}.*/bin/python{version}")
        if path.parts[-3].rpartition(".")[2].isdecimal()
    }
    return found[max(found)] if found else version


def group(name: str) -> list[str]:
    """Return the requirements of one dependency group of pyproject.toml."""
    return list(nox.project.dependency_groups(PYPROJECT, name))


def install(session: nox.Session, *requirements: str) -> None:
    """Install torch first and separately, so that the pinned build satisfies other requirements."""
    torch = [r for r in requirements if r.startswith("torch==")]
    if torch:
        session.install(*torch)
    session.install(*(r for r in requirements if r not in torch))


def pytest(session: nox.Session, *arguments: str, **options) -> None:
    """Run pytest on all cores (up to a limit), unless posargs specify otherwise."""
    parallel = ("-n", "auto", "--maxprocesses", str(MAX_TEST_PROCESSES))
    session.run("python", "-m", "pytest", *parallel, *arguments, *session.posargs, **options)


def repository_without_sources(session: nox.Session) -> Path:
    """Return a copy of the repository whose tests import the installed package."""
    folder = Path(session.create_tmp()).resolve() / "repository"
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", *SOURCES)
    return Path(shutil.copytree(".", folder, ignore=ignored))


def cuda_plugin(session: nox.Session, requirements: str = "cuda-plugin") -> str:
    """Install JAX's CUDA plugin in a separate folder and return its path, or "" if that fails.

    In the environment itself, every process would load it and report that there is no GPU.
    """
    folder = Path(session.virtualenv.location) / "cuda_plugin"
    if not folder.exists():
        try:
            session.install("--no-deps", "--target", str(folder), *group(requirements))
        except nox.command.CommandFailed:
            session.warn("JAX's CUDA plugin cannot be installed; tests that need it are skipped")
            shutil.rmtree(folder, ignore_errors=True)
            return ""
    return str(folder.resolve())


def install_models(session: nox.Session, *requirements: str) -> None:
    """Install packages with models; nothing that they require may bring another torch."""
    install(session, "torch==2.13.0", *requirements, *group("models"))
    session.install("--no-deps", *group("models-apart"))
    session.install("-e", ".")


@nox.session
def demo(session: nox.Session) -> None:
    """Train a digit classifier in JAX, continue in PyTorch, evaluate in NumPy, and compare them."""
    install(session, *group("demo"))
    session.install("-e", ".")
    session.run("python", "examples/digits.py", *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """Run all examples but the demo and `replace_in_diffusers`, or those named in posargs."""
    install_models(session, *group("demo"), *group("peers"))
    names = ("tiled_image", "spatial_parallel_training", "tiled_vae", "digits_ring")
    for script in session.posargs or [f"examples/{name}.py" for name in names]:
        session.run("python", script)


@nox.session
def quick(session: nox.Session) -> None:
    """Run the fast tests on NumPy and array-api-strict in a minute, for use while editing."""
    install(session, *group("runner"), *group("pure"))
    session.install("-e", ".")
    pytest(session, "--backends", f"{PURE_BACKENDS},toy", "-m", "not slow", *QUIET_SKIPS)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests with every backend that can be installed here."""
    install(session, *group("tests"))
    session.install("-e", ".")
    session.env["GROUPNORM_CUDA_PLUGIN"] = cuda_plugin(session)
    if session.posargs:
        pytest(session)
        return
    pytest(session, "--ignore=tests/models")  # in a session of their own, with their packages
    # With one device, JAX arrays use other code than with several.
    one_device = ("--backends", "jax", "--backends-only", "--jax-devices", "1", "-m", "not slow")
    done = [f"--ignore={path}" for path in ANY_DEVICES]
    pytest(session, *one_device, *done, *QUIET_SKIPS)
    # The GPU kernels, interpreted: PyTorch's rows of the suite, and all of the kernels' own tests.
    # The kernels ignore the variance mode, and compiled programs call them as eager ones do.
    apart = ("-m", "not slow", "-k", "not two-pass and not compile and not thread_count")
    pytest(session, "--interpret", "--backends", "torch", *apart, *INTERPRETED, *QUIET_SKIPS)
    others = ("--backends", "jax,cupy", "--jax-devices", "1")
    pytest(session, "--interpret", *others, INTERPRETED[0], *QUIET_SKIPS)


@nox.session
def models(session: nox.Session) -> None:
    """Run the tests on models of diffusers, transformers and timm, and with other tools."""
    install_models(session, *group("runner"), *group("pure"), *group("examples"))
    # One process, as the packages take long to import; .ci/run starts it beside other sessions.
    session.run("python", "-m", "pytest", "tests/models", *session.posargs)


@nox.session(python=python("3.12"))
def gpu_stack(session: nox.Session) -> None:
    """Run the tests that versions break on the packages of a machine with a GPU, which are 6 GB."""
    session.install(*group("gpu-stack"))
    session.install("--no-deps", *group("gpu-stack-apart"))
    session.install("-e", ".", env={"GROUPNORM_BUILD_CORE": "1"})
    session.env["GROUPNORM_CUDA_PLUGIN"] = cuda_plugin(session, "gpu-stack-plugin")
    if session.posargs:
        pytest(session)
        return
    for backends, files in GPU_STACK:
        pytest(session, "--backends", backends, "--jax-devices", "1", *files, *QUIET_SKIPS)


@nox.session(python=python("3.13"))
def newest(session: nox.Session) -> None:
    """Run NumPy's and JAX's tests with the newest release of everything but PyTorch."""
    session.install("--upgrade", "--upgrade-strategy", "eager", *group("newest"))
    session.install("-e", ".")
    # All but PyTorch's rows, on one device, where JAX's kernels are used.
    backends = ("--backends", "numpy,jax,brainstate,equinox,flax,optax", "--jax-devices", "1")
    if session.posargs:
        pytest(session, *backends)
        return
    pytest(session, *backends, "-m", "not slow", *NEWEST, *QUIET_SKIPS)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Compare random calls with a reference: `-- --seconds 600 --seed 1`, `-- --count 10000`."""
    install(session, *group("tests"))
    session.install("-e", ".")
    session.run("python", "-m", "tests.fuzz", *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Change one operator at a time in a copy, and list what no test notices; `-- FILE` for one."""
    # The package itself is not installed: the tests must import the copy.
    install(session, *PYPROJECT["project"]["dependencies"], *group("mutants"))
    session.run("python", "tests/mutants/run.py", *session.posargs)


@nox.session
def minimal(session: nox.Session) -> None:
    """Import and test with only NumPy and array-api-compat, in the oldest supported versions."""
    install(session, *LOWEST, *group("runner"))
    # Without the compiled core, which other sessions may have built in the checkout.
    session.install(".", env={"GROUPNORM_BUILD_CORE": "0"})
    with session.chdir(repository_without_sources(session)):
        session.run("python", "tests/programs/check_minimal.py")
        session.run("python", "-m", "groupnorm", "--json")
        pytest(session, "--backends", "numpy", *QUIET_SKIPS)


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run the kernels' tests with gcc's sanitizers: addresses, undefined behaviour, threads."""
    install(session, *group("runner"), *group("pure"))
    compiler = os.environ.get("CXX", "g++")
    for sanitizers, (libraries, options, tests) in SANITIZERS.items():
        build = {"GROUPNORM_SANITIZE": sanitizers, "GROUPNORM_BUILD_CORE": "1", "CXX": compiler}
        session.install(".", env=build)
        files = [
            session.run(compiler, f"-print-file-name={name}", silent=True, external=True).strip()
            for name in libraries
        ]
        # With Python's own allocator, few errors at the end of an array would be seen.
        env = {"LD_PRELOAD": " ".join(files), "PYTHONMALLOC": "malloc", **options}
        chosen = [] if session.posargs else [f"tests/{name}" for name in tests]
        with session.chdir(repository_without_sources(session)):
            # Without the core, its tests would be skipped.
            session.run("python", "-c", "import groupnorm.backends.kernels.cpu._core", env=env)
            pytest(session, "--backends", PURE_BACKENDS, *chosen, env=env)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build sdist and wheel, and run the sdist's tests against the installed wheel."""
    # The tests session runs every backend. Only the set of files and their locations can differ
    # here, so the two fastest backends and the tests that use every file are enough; the self-check
    # adds JAX and the extras.
    session.install("build")
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder)
    # The wheel is built from the sdist, and not without its compiled core.
    command = ("python", "-m", "build", "--outdir", str(folder))
    session.run(*command, silent=True, env={"GROUPNORM_BUILD_CORE": "1"})
    [built] = folder.glob("*.whl")
    [sdist] = folder.glob("*.tar.gz")
    if "-cp311-abi3-" not in built.name:
        session.error(f"{built.name} is not for the stable ABI of Python 3.11")
    if sys.platform == "linux":
        session.install("auditwheel")
        shown = session.run("auditwheel", "show", str(built), silent=True)
        session.log(shown)
        if not re.search(r'platform\s+tag:\s+"(many|musl)linux', shown):
            session.error("the compiled core needs libraries that not every Linux has, see above")

    install(session, *group("runner"), *group("pure"), f"{built}[cli,jax]")
    session.install("--force-reinstall", "--no-deps", str(built))

    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    outside = folder / sdist.name.removesuffix(".tar.gz")
    for name in SOURCES:
        path = outside / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with session.chdir(outside):
        version = PYPROJECT["project"]["version"]
        session.run("python", "tests/programs/check_wheel.py", version)
        session.run("python", "-m", "groupnorm")
        pytest(
            session, "--backends", f"{PURE_BACKENDS},toy", "-m", "not slow", *WHEEL, *QUIET_SKIPS
        )


@nox.session
def types(session: nox.Session) -> None:
    """Type-check the package and its public API with mypy (strict) and pyright."""
    install(session, *group("types"))
    session.install("-e", ".")
    session.run("mypy", "-p", "groupnorm", *session.posargs)
    session.run("mypy", "tests/typing", *session.posargs)
    session.run("pyright")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff, and the import rules; `-- --fix` repairs style."""
    session.install(*group("lint"))
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", *(() if "--fix" in session.posargs else ("--check", "--diff")))
    session.run("lint-imports", "--no-cache")


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmark scripts named in posargs, or all of them."""
    install(session, *group("bench"))
    session.install("-e", ".")
    for script in session.posargs or sorted(map(str, Path("benchmarks").glob("[!_]*.py"))):
        # The GPU benchmark exits with 2 if there is no GPU.
        codes = [0, 2] if Path(script).name == "gpu.py" else [0]
        session.run("python", script, success_codes=codes)
