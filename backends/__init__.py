"""One folder per array library, with the same file names in each; see CONTRIBUTING.md.

``adapter.py`` is the library's `groupnorm.adapter.Adapter`, ``layer.py`` its layer; ``cpu.py`` and
``gpu.py`` call the compiled kernels of ``kernels/``. A library that follows the array API needs
none of this: ``array_api.py`` handles it. `groupnorm.dispatch` has one row per library.
"""
