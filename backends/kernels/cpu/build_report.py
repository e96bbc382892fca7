"""Why the compiled core is not there, from the report that `setup.py` leaves in its place."""

import sys
from pathlib import Path

__all__ = ["why_not_built"]

_REPORT = Path(__file__).with_name("build_error.txt")
# Without these options, pip may keep what is installed, or install what it built before.
_AGAIN = "install groupnorm again, with pip's options --force-reinstall --no-deps --no-cache-dir"
_COMPILERS = {
    "linux": "g++ and Python's headers (Debian, Ubuntu: apt install g++ python3-dev; Fedora: dnf "
    "install gcc-c++ python3-devel)",
    "darwin": "clang (xcode-select --install)",
    "win32": "clang-cl and Microsoft C++ Build Tools (winget install LLVM.LLVM, and "
    "Microsoft.VisualStudio.2022.BuildTools)",
}


def why_not_built() -> str:
    """Return why there is no compiled core, and what to install to get it."""
    try:
        first, *rest = _REPORT.read_text("utf-8", errors="replace").splitlines() or [""]
    except FileNotFoundError:
        return (
            "the compiled core for CPUs is missing, as in a checkout, which hides an installed "
            "package from Python in its folder; install the checkout with pip install -e ."
        )
    if "GROUPNORM_BUILD_CORE" in first:
        return (
            f"the compiled core for CPUs was left out, because {first} during the installation; "
            f"unset it, and {_AGAIN}"
        )
    compiler = _COMPILERS.get(sys.platform, "a compiler for C++17, such as g++ or clang")
    more = f" (more in {_REPORT})" if rest else ""
    return (
        f"the compiled core for CPUs could not be built during the installation: {first}{more}; "
        f"install a C++17 compiler, here {compiler}, and {_AGAIN}"
    )
