"""What is noteworthy about a dataset: a line for the log, and the details for logs/data.txt."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from logging import INFO, WARNING, getLogger

from cnn.errors import Refused
from cnn.utils.screen import list_some

logger = getLogger(__name__)


@dataclass
class Findings:
    """The facts about a dataset that its user has to know, such as which files are left out.

    Attributes:
        found: the facts, in the order in which they were found. Each is a line, under which there
            are further lines, such as the paths of all files that are meant.
    """

    found: dict[str, Sequence[str]] = field(default_factory=dict)

    def add(self, line: str, details: Sequence[str] = (), level: int = INFO) -> None:
        """Logs a fact in one line, and keeps it with its details for the data sheet.

        Args:
            line: the fact. It says what was found, what the run makes of it and, if the user can
                choose otherwise, the setting for that.
            details: further lines, such as paths. They are not logged.
            level: the level of the line in the log. A fact that can be a mistake of the user is a
                warning.
        """
        self.found[line] = details
        logger.log(level, "%s", line)

    def add_all(
        self, noun: str, items: Sequence[str], line: str, level: int = WARNING, refuse: bool = False
    ) -> None:
        """Adds the fact that there are so many things of a kind, if there are any.

        Args:
            noun: what the things are, in the singular, such as "image".
            items: a text for each thing, such as its path.
            line: the rest of the line, after the number of things and the noun.
            level: the level of the line in the log.
            refuse: whether to raise Refused with the line and the first items instead.

        Raises:
            Refused: `refuse` is set, and `items` is not empty.
        """
        line = f"{len(items)} {noun}{'s' if len(items) > 1 else ''} {line}"
        if items and refuse:
            lines = list_some(items, 20, "\n  ")
            raise Refused(f"data.root: {line}:\n  {lines}")
        if items:
            self.add(line, items, level)
