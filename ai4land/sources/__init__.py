"""What inputs exist and how to get them: the catalogue of known sources, STAC search, downloads, and a mirror for nodes without internet.

May import the modules at the top of :mod:`ai4land`. Knows nothing of grids beyond a bounding box, and nothing of runs.

Start with :mod:`ai4land.sources.known` (the catalogue) and :mod:`ai4land.sources.fetch` (what ``ai4land fetch`` does).
"""
