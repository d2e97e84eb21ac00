"""``ropepp analyze``: one file a command, which measures, prints, draws and writes; `text` has the
rows that are read, `output` the table and figures.
"""
