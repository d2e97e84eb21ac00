"""What a run is asked for and what it leaves on disk, for all who look after runs:

1. `config` and `settings`: what the YAML of a sweep or pipeline may say; keys of ``fit`` as flags;
2. `process`: a ``fit`` that has been started, watched, asked to end;
3. `status` and `records`: how far a run has come, and what a sweep's folder says of it;
4. `checkpoints`: which there are, whether they are whole;
5. `machine`: the device, commit and versions that stand beside every result;
6. `table`: the results of finished runs.
"""
