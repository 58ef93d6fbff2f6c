"""The analysis-ready store of a run: all inputs on one grid in one Zarr store, coarse states still coarse.

May import :mod:`ai4land.rasters`, :mod:`ai4land.workers` and the modules at the top of :mod:`ai4land`.

Start with :mod:`ai4land.store.write` (how it is laid out) and :mod:`ai4land.store.read` (how everything else reads it).
"""
