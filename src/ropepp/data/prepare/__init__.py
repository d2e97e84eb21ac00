"""From raw text to a corpus: `prepare` plans and cuts the work into shards, `workers` does it in
several processes, and `encode` turns a shard into tokens (`safe_cuts` says where a giant document
may be cut without a change of its tokens). `inspect` looks at the result.
"""
