"""Measuring saved models.

`evaluate` fills one table: `perplexity` of texts, short tasks (`harness`), and what is generated
for `ruler` and `babilong` (`tasks`, `generated`); `subject` is the model with what it has
answered, `scores` are rows of the table.

`analyze` looks into heads: with `attention_maps`, `noise`, `recall` and `curves`.
"""
