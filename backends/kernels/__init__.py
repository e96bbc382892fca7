"""Compiled kernels, and how they are planned and launched for every library.

``layout.py`` says which calls they compute; ``cpu/`` and ``gpu/`` plan and launch, and what numba
and Triton compile lies in their ``compiled/``.
"""
