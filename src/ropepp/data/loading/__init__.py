"""From rows to steps: `loader` orders and deals them, `mixture` blends the rows of several corpora,
`datamodule` is what Lightning sees of it.
"""
