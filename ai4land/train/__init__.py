"""Training: splits, patches, the loss with coarse totals imposed, the loop, and groups of processes that train together.

May import :mod:`ai4land.model`, :mod:`ai4land.constrain` and what lies below them; the store comes in as a dataset.

Start with :mod:`ai4land.train.loop`.
"""
