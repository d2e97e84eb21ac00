"""What cuts across a step: `guard` skips bad ones, `metrics` logs, `suite` evaluates on other text,
`progress` shows, `profile` traces, `checkpoint` saves, `run_files` describes the run, `predictions`
writes losses of tokens.
"""
