"""From probabilities to maps that add up to the coarse scenario, and keep their history.

May import the modules at the top of :mod:`ai4land`. Everything here works on arrays of one window.

Start with :mod:`ai4land.constrain.totals` (what a map should add up to), then :mod:`ai4land.constrain.project` (fractions),
:mod:`ai4land.constrain.allocate` (whole cells) and :mod:`ai4land.constrain.walk` (year by year).
"""
