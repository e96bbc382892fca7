"""All checks and chores of this repository: `nox -l` lists them, `nox -s NAME -- ARGS` runs one."""

import shutil
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
MAX_TEST_PROCESSES = 4  # each loads every framework: about 1 GB
QUIET_SKIPS = ("-r", "fE")  # where backends are left out on purpose, their skips are no news
PURE_BACKENDS = "numpy,array_api_strict"  # installed in seconds, and nothing is compiled for them
# Tests whose PyTorch rows Triton's kernels are to pass, and first the kernels' own.
INTERPRETED = [
    "tests/kernels/test_gpu_interpreted.py",
    *(
        f"tests/portable/test_{name}.py"
        for name in ("accuracy", "activation", "dtypes", "empty", "gradients", "layouts", "masks")
    ),
]
PACKAGES = ("groupnorm", "backends")  # what a test of the wheel must not find in its folder


def group(name: str) -> list[str]:
    """Return the requirements of one dependency group of pyproject.toml."""
    return list(nox.project.dependency_groups(PYPROJECT, name))


def install(session: nox.Session, *requirements: str) -> None:
    """Install torch first and alone, so that whatever else wants torch finds the pinned build."""
    torch = [r for r in requirements if r.startswith("torch==")]
    if torch:
        session.install(*torch)
    session.install(*(r for r in requirements if r not in torch))


def pytest(session: nox.Session, *arguments: str, **options) -> None:
    """Run pytest on all cores (up to a limit), or as posargs say."""
    parallel = ("-n", "auto", "--maxprocesses", str(MAX_TEST_PROCESSES))
    session.run("python", "-m", "pytest", *parallel, *arguments, *session.posargs, **options)


def cuda_plugin(session: nox.Session) -> str:
    """Install JAX's plugin for CUDA beside the other packages, and return where, or "".

    Among them it would be loaded into every process, which has no GPU, and say so.
    """
    folder = Path(session.virtualenv.location) / "cuda_plugin"
    if not folder.exists():
        try:
            session.install("--no-deps", "--target", str(folder), *group("cuda-plugin"))
        except nox.command.CommandFailed:
            session.warn("JAX's plugin for CUDA cannot be installed; what needs it is skipped")
            shutil.rmtree(folder, ignore_errors=True)
            return ""
    return str(folder.resolve())


@nox.session
def demo(session: nox.Session) -> None:
    """Train a digit classifier in JAX, go on in PyTorch, evaluate in NumPy, and compare them."""
    install(session, *group("demo"))
    session.install("-e", ".")
    session.run("python", "examples/digits.py", *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """Run the examples of several devices, or the ones named in posargs."""
    install(session, *group("demo"))
    session.install("-e", ".")
    several = ("examples/tiled_image.py", "examples/spatial_parallel_training.py")
    for script in session.posargs or several:
        session.run("python", script)


@nox.session
def quick(session: nox.Session) -> None:
    """Run the quick tests on NumPy and array-api-strict, in a minute: for use while editing."""
    # Without numba, whose compilations take minutes, the portable implementation does it all.
    install(session, *group("runner"), *group("pure"))
    session.install("-e", ".")
    pytest(session, "--backends", f"{PURE_BACKENDS},toy", "-m", "not slow", *QUIET_SKIPS)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests with every backend that can be installed here."""
    install(session, *group("tests"))
    session.install("-e", ".")
    session.env["GROUPNORM_CUDA_PLUGIN"] = cuda_plugin(session)
    pytest(session)
    if session.posargs:
        return
    # With one device JAX's arrays are computed by other code than with several.
    one_device = ("--backends", "jax", "--backends-only", "--jax-devices", "1")
    pytest(session, *one_device, *QUIET_SKIPS)
    # The kernels for GPUs, interpreted: PyTorch's rows of the suite, and all of their own tests.
    # Both variance modes are one to them, and compiled programs call them as eager ones do.
    apart = ("-m", "not slow", "-k", "not two-pass and not compile and not thread_count")
    pytest(session, "--interpret", "--backends", "torch", *apart, *INTERPRETED, *QUIET_SKIPS)
    others = ("--backends", "jax,cupy", "--jax-devices", "1")
    pytest(session, "--interpret", *others, INTERPRETED[0], *QUIET_SKIPS)


@nox.session
def minimal(session: nox.Session) -> None:
    """Import and test with NumPy and array-api-compat alone, in the oldest versions supported."""
    install(session, *LOWEST, *group("runner"))
    session.install("-e", ".")
    session.run("python", "tests/programs/check_minimal.py")
    session.run("python", "-m", "groupnorm", "--json")
    pytest(session, "--backends", "numpy", *QUIET_SKIPS)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build sdist and wheel, and run the sdist's tests against the installed wheel."""
    # The tests session has run every backend. What can differ here is which files there are and
    # where they lie, so the two quickest will do here, and the self-check adds JAX and the extras.
    session.install("build")
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder)
    session.run(
        "python", "-m", "build", "--outdir", str(folder), silent=True
    )  # the wheel from the sdist
    [built] = folder.glob("*.whl")
    [sdist] = folder.glob("*.tar.gz")

    install(session, *group("runner"), *group("pure"), f"{built}[cli,jax]")
    session.install("--force-reinstall", "--no-deps", str(built))

    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    outside = folder / sdist.name.removesuffix(".tar.gz")
    for package in PACKAGES:
        shutil.rmtree(outside / package)
    with session.chdir(outside):
        version = PYPROJECT["project"]["version"]
        session.run("python", "tests/programs/check_wheel.py", version)
        session.run("python", "-m", "groupnorm")
        pytest(session, "--backends", PURE_BACKENDS, *QUIET_SKIPS)


@nox.session
def types(session: nox.Session) -> None:
    """Type-check the package and a user's view of it with mypy (strict) and pyright."""
    install(session, *group("types"))
    session.install("-e", ".")
    session.run("mypy", "-p", "groupnorm", *session.posargs)
    session.run("mypy", "tests/typing", *session.posargs)
    session.run("pyright")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff, and what imports what; `-- --fix` repairs style."""
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
        # 2 is what the benchmark of GPUs says where there is none.
        codes = [0, 2] if Path(script).name == "gpu.py" else [0]
        session.run("python", script, success_codes=codes)
