"""Publish a cube and its model: a static STAC catalogue, cloud-optimised GeoTIFFs, licences and credits.

May import :mod:`ai4land.cube`, :mod:`ai4land.model`, :mod:`ai4land.sources` and the modules at the top of :mod:`ai4land`.
Start with :mod:`ai4land.publish.catalogue`.
"""
