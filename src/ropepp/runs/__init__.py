"""What a run is asked for and what it leaves on disk, for all who look after runs:

1. `settings`: keys of ``fit`` from YAML, as flags, and the command that starts it;
2. `process`: a ``fit`` that has been started, watched, asked to end;
3. `status` and `records`: how far a run has come, and what a sweep's folder says of it;
4. `checkpoints`: which there are, whether they are whole;
5. `machine`: the device, commit and versions that stand beside every result;
6. `table`: the results of finished runs.
"""
