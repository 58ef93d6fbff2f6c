"""Serve a cube over HTTP: a page with a map, web tiles, and the cube's own files for other readers.

May import :mod:`ai4land.cube` and the modules at the top of :mod:`ai4land`.
Start with :mod:`ai4land.serve.app` (the routes); ``page/`` holds the page's HTML, CSS and JavaScript.
"""
