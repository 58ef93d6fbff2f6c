"""Block-wise inference: the plan of blocks, one block from the store to the cube, and all blocks on a Dask cluster.

May import :mod:`ai4land.store`, :mod:`ai4land.model`, :mod:`ai4land.constrain`, :mod:`ai4land.cube`, :mod:`ai4land.workers` and what lies below them.

Start with :mod:`ai4land.reconstruct.block`: the life of one block.
"""
