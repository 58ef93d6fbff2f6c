"""Coarse land-use scenarios onto the coarse grid: LUH2 and LUH3 states, class shares, some land uses, or yearly change.

May import :mod:`ai4land.rasters` and the modules at the top of :mod:`ai4land`.

Start with :mod:`ai4land.scenario.coarse`: the checks that every scenario passes. Each other module is one kind of scenario.
"""
