"""Training with Lightning: `lightning_cli` composes a run from YAML and flags (`parsing` reads
them, `launching` knows its process), `module` is the step, `guard` skips bad ones, `optim` and
`schedules` are how weights move, `strategy` how they are shared by processes, `weights` what a run
begins with. `callbacks` watch, save and log; `evaluation` measures; `estimate` foretells.
"""
