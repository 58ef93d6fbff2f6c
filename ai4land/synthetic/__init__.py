"""A tiny planet in the real formats, for the demo and the tests.

May import the modules at the top of :mod:`ai4land`.

Start with :mod:`ai4land.synthetic.planet`.
"""
