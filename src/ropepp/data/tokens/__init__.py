"""Tokens and how they lie on disk: `tokenizer` makes ids of text, `writer` has the files of ids and
offsets of a shard, `join_shards` makes shards a corpus, `meta` is the JSON beside them, and
`corpus` is all of it, opened to read.
"""
