"""Measuring saved models.

`evaluate` finds the data of the suites and fills one table, whose rows are `scores`. `perplexity`
reads texts in windows. `local_data` knows the files of the short tasks, which `harness` hands to
lm-eval's own model over ours. `tasks` says what a long-context task is, `ruler` and `babilong` make
them, and `generated` runs them, also as the paper has, with continuations scored by `likelihood`;
`evaluated_model` is the model with the cache of what was measured of it.

`analyze` looks into heads.
"""

SUITES = ("perplexity", "short", "ruler", "babilong")  # of `ropepp evaluate`
PROTOCOLS = ("official", "paper")  # of ruler and babilong
