"""The dtypes and activations that kernels are compiled for."""

__all__ = ["ACTIVATIONS", "DTYPES"]

#: Dtypes of x, of the result and of a cotangent.
DTYPES = ("float32", "float16", "bfloat16")

#: The number that identifies an activation in kernels.
ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "silu": 2, "gelu": 3}
