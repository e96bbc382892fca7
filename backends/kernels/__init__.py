"""Fused loops, one file for each language; what launches them stays in the adapters."""
