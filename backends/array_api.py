"""Any other array API library: array-api-strict, Dask, sparse and so on."""

from typing import Any

import array_api_compat

from groupnorm.adapter import Adapter, Planning
from groupnorm.errors import ArgumentValueError

__all__ = ["GenericAdapter", "generic_adapter_of"]


class GenericAdapter(Adapter):
    """The adapter of libraries that this package has no specific adapter for."""

    def __init__(self, xp: Any) -> None:
        super().__init__(xp)
        library = xp.__name__.removeprefix("array_api_compat.").split(".")[0]
        self.label = library
        self.array_name = f"{library} arrays"

    def is_array(self, x: object) -> bool:
        """Whether x is an array of this adapter's namespace."""
        return (
            array_api_compat.is_array_api_obj(x) and array_api_compat.array_namespace(x) is self.xp
        )

    def admit(self, x: Any, argument: str = "x") -> Any:
        """Reject unknown sizes; drop Dask's empty chunks."""
        if any(not isinstance(size, int) for size in x.shape):
            raise ArgumentValueError(
                f"{argument} has shape {x.shape} with unknown sizes: statistics need the number of "
                f"elements. For Dask call {argument}.compute_chunk_sizes() first."
            )
        chunks = getattr(x, "chunks", ())
        if all(size for sizes in chunks for size in sizes):
            return x
        # Dask's max and min fail for empty chunks (2026.8).
        return x.rechunk(tuple(tuple(filter(None, sizes)) or (0,) for sizes in chunks))

    def planning(self, shape: tuple[int, ...]) -> Planning:
        """Disable blocked sums for Dask: it may split an array along any axis."""
        return Planning(blocked_sums=not array_api_compat.is_dask_namespace(self.xp))


_adapters: dict[str, GenericAdapter] = {}


def generic_adapter_of(x: Any) -> GenericAdapter | None:
    """Return the adapter of an array's namespace; None if x is not an array."""
    if not array_api_compat.is_array_api_obj(x):
        return None
    xp = array_api_compat.array_namespace(x)
    found = _adapters.get(xp.__name__)
    if found is None or found.xp is not xp:
        found = _adapters[xp.__name__] = GenericAdapter(xp)
    return found
