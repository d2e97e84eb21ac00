"""What was left out of raw text, and why."""

from dataclasses import dataclass, field

REPORTED = 1000  # bad lines of a shard that are named; all are counted


@dataclass
class Skipped:
    """What was left out of raw text; `reports` has "file, line, reason" of the first bad lines,
    between tabs."""

    bad_lines: int = 0
    empty_documents: int = 0
    short_documents: int = 0
    reports: list[str] = field(default_factory=list, compare=False)

    def bad(self, file: str, line: str, reason: str) -> None:
        """Counts a bad line and keeps why it is one."""
        self.bad_lines += 1
        if len(self.reports) < REPORTED:
            self.reports.append("\t".join((file, line, " ".join(reason.split()))))
