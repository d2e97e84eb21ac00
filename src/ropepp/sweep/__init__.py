"""Many runs compared, in the order in which a sweep comes about:

1. `config`: its YAML, and the rows and runs that follow from it;
2. `check`: what ``fit`` says about each row before anything is trained;
3. `study`: its folder, in which the runs are the truth about what is left to do;
4. `search`: Optuna, which proposes points and prunes, told by `study` what the runs came to;
5. `runner`: the driver, which starts, watches and adopts runs until nothing is left;
6. `results`: variants compared over seeds, for the `report` with its `plots`;
7. `boards` and `maps`: the same for TensorBoard.
"""
