"""Raw text in: `sources` finds the files of what was named and puts them in order, `readers` gets
documents out of .txt, .jsonl and others, `tables` out of parquet rows and datasets; `documents` are
texts of any length, and `skipped` counts what was left out.
"""
