"""Compiled kernels: planning and launching them, for every library.

``layout.py`` defines which calls are supported; ``cpu/`` and ``gpu/`` plan and launch; the code
is in ``cpu/core/`` (C++) and ``gpu/compiled/`` (Triton).
"""
