"""Scores against held-out years and regions, rivals to compare with, intervals and figures.

May import :mod:`ai4land.train`, :mod:`ai4land.reconstruct` and what lies below them.

Start with :mod:`ai4land.evaluate.evaluate`: the loop over windows and years.
"""
