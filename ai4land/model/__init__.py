"""The network and its input, on plain arrays and tensors: usable without xarray, Dask, Zarr, a store or a cluster.

May import the modules at the top of :mod:`ai4land` that need none of these either.

Start with :mod:`ai4land.model.features`, the one function that makes model input, then :mod:`ai4land.model.unet`.
"""
