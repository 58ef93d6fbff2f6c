"""Read raster files, STAC assets and annual land-cover maps onto the grid: by window, resampled, with gaps filled.

May import :mod:`ai4land.sources` and the modules at the top of :mod:`ai4land`.

Start with :mod:`ai4land.rasters.read`, which reads one layer, or a window of it, onto the grid.
:mod:`ai4land.rasters.file` handles the file formats.
"""
