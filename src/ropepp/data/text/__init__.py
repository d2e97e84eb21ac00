"""Raw text in: `sources` finds the files of what was named and puts them in order, `readers` gets
documents out of .txt, .jsonl and others and count what is left out, `tables` gets them out of
parquet and arrow files; `documents` are texts of any length.
"""
