"""``ropepp corpus inspect|verify FOLDER``."""


def main(args: list[str]) -> None:
    """Looks at prepared corpora; ``args`` are those after ``ropepp corpus``."""
    from jsonargparse import auto_cli

    from ropepp.data.prepare.inspect import inspect, verify

    commands = [inspect, verify]
    print(auto_cli(commands, args=args, exit_on_error=False, prog="ropepp corpus"), end="")
