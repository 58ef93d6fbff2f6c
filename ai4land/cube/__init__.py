"""The output store: template, checked writer, ledger of what is done, verification, and what a cube says about itself.

May import the modules at the top of :mod:`ai4land`. Knows nothing of networks or runs.

Start with :mod:`ai4land.cube.cube` (create and open) and :mod:`ai4land.cube.template` (its arrays and attributes).
"""
