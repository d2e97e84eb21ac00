"""How tokens lie on disk: `writer` has the files of ids and offsets of a shard, `meta` makes shards
a corpus and has the JSON beside them, and `corpus` is all of it, opened to read.
"""
