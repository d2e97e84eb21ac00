"""RoPE++: an experiment template. Where to find what, from the ground up:

* `errors`, `files`, `options`, `statistics` stand alone;
* `data` turns raw text into rows of tokens, `model` rows into losses; neither knows the other;
* `runs` is what a run leaves on disk, and `train` makes runs;
* `generate` continues texts, `interop` opens any saved model and exports it;
* `eval` measures models, `sweep` compares many, `pipeline` trains in stages;
* `commands` parse arguments, and `cli` picks one.

Each imports only what stands before it.
"""

__version__ = "0.1.0"
