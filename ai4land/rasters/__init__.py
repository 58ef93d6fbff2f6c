"""Fine maps onto the grid: one file, STAC asset or annual land-cover map, read in windows, resampled and with its gaps filled.

May import :mod:`ai4land.sources` and the modules at the top of :mod:`ai4land`.

Start with :mod:`ai4land.rasters.read`: one layer, or a window of it, on the grid. :mod:`ai4land.rasters.file` knows the file formats.
"""
