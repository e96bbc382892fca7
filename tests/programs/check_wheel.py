"""Check the installed distribution from outside the checkout: `python check_wheel.py VERSION`."""

import sys
from importlib import metadata, resources, util
from pathlib import Path


def main(version: str) -> str | None:
    import groupnorm
    import groupnorm.backends

    installed = Path(groupnorm.__file__)
    files = [str(file) for file in metadata.files("groupnorm") or ()]
    folders = {file.split("/")[0] for file in files if not file.startswith("..")}
    checks = {
        "the package is imported from site-packages": installed.parent.parent.name
        == "site-packages",
        "the adapters are inside it": Path(groupnorm.backends.__file__).is_relative_to(
            installed.parent
        ),
        "nothing called backends is importable": util.find_spec("backends") is None,
        "nothing but it and the pytest plugin is installed": {
            f for f in folders if not f.endswith((".dist-info", "__pycache__"))
        }
        == {"groupnorm", "pytest_groupnorm.py"},
        "py.typed is there": resources.files("groupnorm").joinpath("py.typed").is_file(),
        "the compiled core is there": any(Path(f).match("cpu/_core.*") for f in files),
        "neither its sources nor a report of its build are": not any(
            f.endswith((".cpp", ".hpp", "build_error.txt")) for f in files
        ),
        "the license is there": any(file.endswith("licenses/LICENSE") for file in files),
        f"the version is {version}": metadata.version("groupnorm") == version,
        "__version__ agrees": getattr(groupnorm, "__version__", version) == version,
    }
    for check, holds in checks.items():
        print("ok  " if holds else "FAIL", check)
    return None if all(checks.values()) else f"the installed distribution is wrong: {installed}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
