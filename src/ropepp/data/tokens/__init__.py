"""Tokens on disk: `writer` has the files of ids and offsets, `meta` the JSON beside them, and
`corpus` is both together, opened to read or to write.
"""
