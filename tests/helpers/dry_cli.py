"""The command line of fit without a run."""

from ropepp.train.lightning_cli import RopeppCLI


class DryCLI(RopeppCLI):
    """Instantiates everything and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""
