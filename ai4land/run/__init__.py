"""A run file and its verbs. The only package, with the command line, that knows a run's configuration.

May import every other package; hands plain values down to them.

Start with :mod:`ai4land.run.config` (what a run file may say) and :mod:`ai4land.run.inputs` (a run, resolved once).
"""
