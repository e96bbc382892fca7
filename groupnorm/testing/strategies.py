"""Hypothesis strategies; imported on first use, since hypothesis is an extra."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from groupnorm.testing.inputs import hard_inputs, layouts

__all__ = ["arrays"]


def arrays(
    dtype: Any = "float32",
    *,
    min_dims: int = 1,
    max_dims: int = 4,
    max_side: int = 6,
    any_layout: bool = True,
) -> st.SearchStrategy["np.ndarray[Any, Any]"]:
    """Return a strategy for arrays of hard values in any layout.

    Parameters
    ----------
    dtype : dtype
        As for `hard_inputs`.
    min_dims, max_dims, max_side : int
        The bounds of the number of axes, and of their lengths; lengths are at least 1.
    any_layout : bool
        Whether strides, byte order and alignment vary as well.

    Returns
    -------
    hypothesis.strategies.SearchStrategy

    Examples
    --------
    >>> from groupnorm import testing
    >>> testing.arrays("float32", max_dims=2)  # doctest: +ELLIPSIS
    ...
    """
    names = sorted(hard_inputs(1, dtype))

    @st.composite
    def drawn(draw: Any) -> Any:
        sides = st.lists(st.integers(1, max_side), min_size=min_dims, max_size=max_dims)
        name = draw(st.sampled_from(names))
        seed = draw(st.integers(0, 2**32 - 1))
        x = hard_inputs(tuple(draw(sides)), dtype, seed=seed, names=name)[name]
        if not any_layout:
            return x
        found = layouts(x)
        return found[draw(st.sampled_from(sorted(found)))]

    return drawn()
