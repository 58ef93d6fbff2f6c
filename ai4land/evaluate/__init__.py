"""Scores against held-out years and regions, rivals to compare with, intervals and figures.

May import :mod:`ai4land.store`, :mod:`ai4land.model`, :mod:`ai4land.constrain` and what lies below them; neither training nor reconstruction.

Start with :mod:`ai4land.evaluate.evaluate`: the loop over windows and years.
"""
