"""The output store: template, checked writer, ledger of finished shards, verification and descriptive metadata.

May import the modules at the top of :mod:`ai4land`. Knows nothing of networks or runs.
Start with :mod:`ai4land.cube.cube` (create and open) and :mod:`ai4land.cube.template` (arrays and attributes).
"""
