"""Check an environment that contains only the run-time dependencies."""

import sys
from importlib import util

HEAVY = (
    "jax",
    "jaxlib",
    "torch",
    "cupy",
    "mlx",
    "triton",
    "flax",
    "dask",
    "array_api_strict",
    "rich",
)


def main() -> str | None:
    if present := [name for name in HEAVY if util.find_spec(name)]:
        return f"this environment is not minimal: it has {present}"

    import groupnorm

    for wanted in ("jax", "torch", "cupy", "mlx"):
        try:
            groupnorm.GroupNorm(8, num_groups=2, backend=wanted)
        except groupnorm.errors.BackendImportError as error:
            message = str(error)
        else:
            return f"backend={wanted!r} did not raise BackendImportError"
        print(f"backend={wanted!r}: {message}")
        if f"groupnorm[{wanted}]" not in message:
            return f"the message does not name the extra groupnorm[{wanted}] to install"

    numpy = groupnorm.available_backends()[0]
    if numpy.implementations != {"cpu": ("portable",)}:
        return f"NumPy has {numpy.implementations}, though the compiled core was left out"
    print(f"NumPy: {numpy.why_not_fused['cpu']}")
    if "GROUPNORM_BUILD_CORE=0" not in numpy.why_not_fused["cpu"]:
        return "the reason does not say that the compiled core was left out"

    installed = [backend.name for backend in groupnorm.available_backends() if backend.installed]
    return (
        None if installed == ["numpy"] else f"installed backends are {installed}, not numpy alone"
    )


if __name__ == "__main__":
    sys.exit(main())
