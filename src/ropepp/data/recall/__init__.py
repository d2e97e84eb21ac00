"""Associative recall, a synthetic task: `task` makes the rows, `accuracy` counts right answers by
distance.
"""
