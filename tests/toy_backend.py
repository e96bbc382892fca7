"""A complete backend for a subclass of NumPy arrays. CONTRIBUTING.md walks through it.

Importing it registers it; the row ``toy`` of ``tests/rows.py`` then runs the suite on it.
"""

import types

import array_api_compat.numpy
import numpy as np

from groupnorm.adapter import Adapter
from groupnorm.dispatch import Backend, register
from groupnorm.layer import PlainGroupNorm


class ToyArray(np.ndarray):
    def __array_function__(self, function, types, args, keywords):
        result = super().__array_function__(function, types, args, keywords)
        return result.view(ToyArray) if isinstance(result, np.ndarray) else result


class Namespace(types.ModuleType):
    def __getattr__(self, name):
        found = getattr(array_api_compat.numpy, name)
        if name not in ("arange", "asarray", "full", "ones", "zeros"):
            return found
        return lambda *args, **keywords: found(*args, **keywords).view(ToyArray)


class ToyAdapter(Adapter):
    name, label, array_name = "toy", "Toy", "Toy arrays"
    has_autograd = False

    def is_array(self, x):
        return isinstance(x, ToyArray)

    def device_of(self, x):
        return "cpu"

    def from_host(self, value, like=None):
        return value.view(ToyArray)


class ToyGroupNorm(PlainGroupNorm):
    _adapter_name = "toy"


toy_adapter = ToyAdapter(Namespace("toy"))
register(Backend("toy", ("tests",), lambda: (toy_adapter, ToyGroupNorm)))
