"""A group norm for equinox."""

from typing import Any

import numpy as np

from groupnorm.carrying import channels_of, check_class, parameters_of
from groupnorm.errors import ArgumentValueError
from groupnorm.functional import group_norm
from groupnorm.imports import needs

with needs("equinox", "groupnorm.equinox"):
    import equinox
    import jax

__all__ = ["GroupNorm", "arguments_of", "module_of"]

_NO_STATE: Any = object()


class GroupNorm(equinox.nn.GroupNorm):
    """`equinox.nn.GroupNorm`, computed by this library.

    The arguments, defaults, parameters (``weight`` and ``bias``), names and dtypes are equinox's,
    so that one replaces the other in a model and in a file. As there, the input is one sample:
    use `jax.vmap` for a batch. Results are accurate for a large mean.

    References
    ----------
    .. [1] https://docs.kidger.site/equinox/api/nn/normalisation

    Examples
    --------
    >>> import jax
    >>> from groupnorm.equinox import GroupNorm
    >>> layer = GroupNorm(groups=32, channels=64)
    >>> jax.vmap(layer)(jax.numpy.ones((8, 64, 5, 5))).shape
    (8, 64, 5, 5)
    """

    def __call__(self, x: Any, state: Any = _NO_STATE, *, key: Any = None, mask: Any = None) -> Any:
        """Normalize x.

        Parameters
        ----------
        x : array of shape (C, ...)
            One sample.
        state, key : optional
            Ignored, as in equinox; a state is returned with the result.
        mask : array broadcastable to x, optional
            True for valid elements, which mean and variance are computed from.

        Returns
        -------
        array of x's shape and dtype
            With the state, if there is one.
        """
        x = jax.numpy.asarray(x)[None]
        if mask is not None:  # NumPy's stay such, whose values are checked
            mask = (mask if hasattr(mask, "ndim") else np.asarray(mask))[None]
        if self.channels is not None and x.shape[1:2] != (self.channels,):
            raise ArgumentValueError(
                f"x has shape {x.shape[1:]}, and this layer {self.channels} channels, on the first "
                "axis of one sample: call it for a batch by jax.vmap(layer)(x)."
            )
        y = group_norm(
            x, self.weight, self.bias, mask=mask,
            num_groups=self.groups, epsilon=self.eps, feature_axis=1, dtype="input",
        )[0]  # fmt: skip
        return y if state is _NO_STATE else (y, state)


def arguments_of(module: Any) -> dict[str, Any]:
    """Return the arguments of a layer equal to an `equinox.nn.GroupNorm`, and its parameters.

    The layer's inputs have a batch axis, ``x[None]`` for one sample.
    """
    check_class(module, GroupNorm, equinox.nn.GroupNorm, "__call__")
    if module.channels is None:
        raise ArgumentValueError(
            "layer was created with channels=None: create it with the number of channels."
        )
    return {
        "in_size": (module.channels, ...),
        "feature_axis": 0,
        "num_groups": module.groups,
        "epsilon": module.eps,
        "dtype": "input",
        "scale": module.weight,
        "bias": module.bias,
        "backend": "jax",
    }


def module_of(layer: Any) -> GroupNorm:
    """Return a module equal to a layer, for single samples."""
    module = GroupNorm(layer.num_groups, channels_of(layer), layer.epsilon, layer.use_scale)
    if layer.use_scale:
        values = list(parameters_of(layer, "jax").values())
        module = equinox.tree_at(lambda m: [m.weight, m.bias], module, values)
    return module
