"""From raw text to a corpus: `prepare` plans and cuts the work into shards, `workers` does it in
several processes, `encode` turns a shard into tokens
(`safe_cuts` says where a giant document may be cut without a change of its tokens), and
`join_shards` puts their counts together. `inspect` looks at the result.
"""
