"""Where work runs: Dask clusters on this machine, on SLURM jobs or in an allocation, and tasks that survive their workers.

May import the modules at the top of :mod:`ai4land`. Knows nothing of land cover.

Start with :mod:`ai4land.workers.cluster`.
"""
