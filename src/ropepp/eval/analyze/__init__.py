"""``ropepp analyze``: one file a command, which measures, prints, draws and writes.

`rows` reads the tokens that a model is shown, `heads` sorts its heads into real and imaginary ones,
and `output` writes table, figures and events. `attention_maps` measures for `attention`, and for
sweeps.
"""
