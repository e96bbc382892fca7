"""Build the compiled core of the CPU kernels; `pyproject.toml` has everything else.

If the core cannot be built, the installation succeeds without it, every call uses the portable
implementation, and a report is installed in its place, which `python -m groupnorm` quotes. Set when
installing:

- ``GROUPNORM_BUILD_CORE=0`` leaves the core out; with ``1``, an error of the build is an error of
  the installation.
- ``GROUPNORM_SANITIZE=address,undefined`` (or ``thread``) builds the core with these sanitizers.
- ``GROUPNORM_CXXFLAGS`` adds flags of the compiler after all others, such as ``-O0 -g``.
"""

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("backends/kernels/cpu/core")
HEADERS = sorted(map(str, SOURCES.glob("*.hpp")))
OBJECTS = Path("build/objects")  # may be deleted at any time but during a build
REPORT = "build_error.txt"  # read by backends/kernels/cpu/build_report.py
REPORTED_LINES = 12
ERROR = re.compile(r"\berror\b.*:|\bcannot find\b|\bundefined (reference|symbol)")

REQUEST = os.environ.get("GROUPNORM_BUILD_CORE", "")
SANITIZERS = os.environ.get("GROUPNORM_SANITIZE", "")
MORE_FLAGS = shlex.split(os.environ.get("GROUPNORM_CXXFLAGS", ""))
# Python without a global interpreter lock has no stable ABI until 3.15.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")

# Files choose their instruction sets themselves, so the flags are the same for all of them.
FLAGS = [
  "-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
  "-fvisibility=hidden", "-pthread", "-Wno-maybe-uninitialized",  # of gcc's own headers, wrongly
]  # fmt: skip
LINK_FLAGS = ["-pthread"]
if os.name == "nt":
    FLAGS, LINK_FLAGS = ["/std:c++17", "/O2", "/EHsc"], []
if SANITIZERS:
    FLAGS += [f"-fsanitize={SANITIZERS}", "-g", "-O1", "-fno-omit-frame-pointer"]
    LINK_FLAGS.append(f"-fsanitize={SANITIZERS}")


class BuildCore(build_ext):
    """Compile on all CPUs, keep object files, and replace a failed build by a report."""

    def finalize_options(self) -> None:
        """Build always: the flags may have changed, and equal object files are kept."""
        super().finalize_options()
        self.force = True

    def run(self) -> None:
        """Leave either the core or the report in the folder of the package."""
        core = Path(self.get_ext_fullpath(self.extensions[0].name))
        report = core.parent / REPORT
        report.unlink(missing_ok=True)
        why = "GROUPNORM_BUILD_CORE=0 was set" if REQUEST == "0" else self.build()
        if why:
            core.unlink(missing_ok=True)  # of an earlier build, maybe of other sources
            self.extensions = []  # nothing to install
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(why + "\n", "utf-8")
            self.warn(f"groupnorm is installed without its compiled core: {why}")

    def build(self) -> str:
        """Build the core and return "", or why that failed."""
        choose_compiler()
        with tempfile.TemporaryFile() as output:
            try:
                with redirected_to(output):
                    super().run()
            except Exception as error:  # whatever it is, the portable implementation works
                if REQUEST == "1":
                    raise
                return reason(self.compiler, error, text_of(output))
            finally:
                sys.stderr.write(text_of(output))
        return ""

    def build_extensions(self) -> None:
        """Compile sources in parallel, as setuptools only does with extensions."""
        if self.compiler.compiler_type == "msvc":
            self.compiler.initialize(self.plat_name)
            # Vectors are those of GCC and clang, which Microsoft's compiler does not have.
            self.compiler.cc = shutil.which("clang-cl") or "clang-cl"
        compile_some = self.compiler.compile

        def compile_all(sources, *, output_dir, depends, **options):
            """Compile each source unless an object file of the same text and flags exists."""
            common = hashlib.sha256(repr((identity(self.compiler), options)).encode())
            for header in depends:
                common.update(Path(header).read_bytes())

            def compile_one(source):
                digest = common.copy()
                digest.update(source.encode() + Path(source).read_bytes())
                folder = OBJECTS / digest.hexdigest()[:16]
                if not folder.exists():
                    with tempfile.TemporaryDirectory(dir=OBJECTS) as part:
                        compile_some([source], output_dir=f"{part}/done", **options)
                        with contextlib.suppress(OSError):  # another build was faster
                            os.rename(f"{part}/done", folder)
                return str(next(folder.rglob("*.o*")))

            OBJECTS.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(cpus()) as pool:
                return list(pool.map(compile_one, sources))

        self.compiler.compile = compile_all
        super().build_extensions()


def choose_compiler() -> None:
    """Use a compiler that is installed where the one that compiled Python is not."""
    usual = (sysconfig.get_config_var("CXX") or "").split()
    if os.name == "nt" or "CXX" in os.environ or (usual and shutil.which(usual[0])):
        return
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            os.environ["CXX"] = name
            return


def command_of(compiler) -> list[str]:
    """Return the command that compiles C++, or [] if setuptools did not get so far."""
    return list(getattr(compiler, "compiler_so_cxx", None) or [])


def identity(compiler) -> tuple:
    """Return what distinguishes a compiler and its flags from others, and from its next version."""
    command = command_of(compiler)
    found = shutil.which(command[0]) if command else None
    return command, sys.version_info[:2], found and os.stat(found).st_mtime_ns


def reason(compiler, error: Exception, output: str) -> str:
    """Return what failed in one line, and then the first lines of the compiler's error."""
    command = command_of(compiler)
    if command and not shutil.which(command[0]):
        return f"the C++ compiler {command[0]} was not found"
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if ERROR.search(line)), None)
    name = command[0] if command else "the build"
    if first is None:  # the exception has the whole command
        status = re.search(r"exit (?:status|code) (-?\d+)", str(error))
        return f"{name} failed: {f'exit status {status[1]}' if status else error}"
    lines = lines[first : first + REPORTED_LINES]
    return "\n".join([f"{name} failed: {lines[0]}", *lines[1:]])


@contextlib.contextmanager
def redirected_to(file):
    """Write what this process and its children print to a file."""
    kept = {}
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        kept[number] = os.dup(number)
        os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(kept[number], number)
            os.close(kept[number])


def text_of(file) -> str:
    """Return all that was written to a binary file."""
    file.seek(0)
    return file.read().decode(errors="replace")


def cpus() -> int:
    """Return the number of CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if REQUEST not in ("", "0", "1"):
    sys.exit(f"GROUPNORM_BUILD_CORE={REQUEST!r}: it must be 0, 1 or not set")
setup(
    ext_modules=[
        Extension(
            "groupnorm.backends.kernels.cpu._core",
            sorted(map(str, SOURCES.glob("*.cpp"))),
            language="c++",
            depends=HEADERS,
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if LIMITED_API else [],
            py_limited_api=LIMITED_API,
            extra_compile_args=FLAGS + MORE_FLAGS,
            extra_link_args=LINK_FLAGS + MORE_FLAGS,
        )
    ],
    cmdclass={"build_ext": BuildCore},
    options={
        "bdist_wheel": {"py_limited_api": "cp311"} if LIMITED_API else {},
        # Never in the folder of usual builds, whose files the next wheel contains.
        "build": {"build_base": f"build/sanitize-{SANITIZERS.replace(',', '-')}"}
        if SANITIZERS
        else {},
    },
)
