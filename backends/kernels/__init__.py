"""Compiled kernels: planning and launching them, for every library.

``layout.py`` defines which calls are supported; ``cpu/`` and ``gpu/`` plan and launch; the code
that numba and Triton compile is in their ``compiled/``.
"""
