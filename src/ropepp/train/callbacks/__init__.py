"""What cuts across a step (`step` calls it): `metrics` logs, `suite` evaluates on other text,
`progress` shows, `profile` traces, `checkpoint` saves, `run_files` writes run and predictions.
"""
