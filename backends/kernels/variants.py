"""What kernels are compiled for: dtypes and activations."""

__all__ = ["ACTIVATIONS", "DTYPES"]

#: Dtypes of x, of the result and of a cotangent.
DTYPES = ("float32", "float16", "bfloat16")

#: The number of each activation, as kernels receive it.
ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "silu": 2, "gelu": 3}
