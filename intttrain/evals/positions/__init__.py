"""Held-out loss by position in the document: conditions, baselines, intervals, report and picture."""
