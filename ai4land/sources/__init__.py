"""Find and fetch inputs: the catalogue of known sources, STAC search, downloads, and a mirror for nodes without internet.

May import the modules at the top of :mod:`ai4land`. Uses only bounding boxes, not grids, and knows nothing of runs.

Start with :mod:`ai4land.sources.known` (the catalogue) and :mod:`ai4land.sources.fetch` (what ``ai4land fetch`` does).
"""
