"""Many runs compared: `spec` reads the YAML, `check` asks ``fit`` whether it accepts every row,
`study` (with `database`) says what is to be run, `runner` runs it; `results` are compared in
`report` with `plots`, and `boards` and `maps` make them visible in TensorBoard.
"""
