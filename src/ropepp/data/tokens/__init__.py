"""How tokens lie on disk: `writer` has the files of ids and offsets of a shard, `corpus` makes a
corpus of shards, with the JSON beside them, and opens it, and `reader` reads numbers with checks.
"""
