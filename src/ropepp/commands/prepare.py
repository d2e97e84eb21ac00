"""``ropepp prepare``: its options are the arguments of `ropepp.data.prepare.prepare.prepare`."""


def main(args: list[str]) -> None:
    """Makes token files; ``args`` are those after ``ropepp prepare``."""
    from jsonargparse import auto_cli

    from ropepp.data.prepare.prepare import prepare

    auto_cli(prepare, args=args, exit_on_error=False, prog="ropepp prepare")
