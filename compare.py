"""Sets runs side by side: final figures, the settings that differ, curves over each other.

python compare.py first second            logs/first and logs/second (run=first, run=second)
python compare.py logs/a logs/archive/*   folders of logs, wherever they are

A run that cannot be read is named and the others are compared; the exit status is then 1.
"""

import sys
from pathlib import Path

from cnn import cli
from cnn.errors import Failed, Refused
from cnn.records.compare_runs import compare, read_run
from cnn.utils.files import failing
from cnn.utils.screen import say

PAGE = Path("logs", "compare.html")


def main(argv: list[str] | None = None) -> int:
    return cli.main(prepare, argv, prefix="")


def prepare(argv: list[str]) -> None:
    """Does all of it, since it needs no torch."""
    parser = cli.parser("compare.py", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of logs, or a run's name")
    parser.add_argument("--output", type=Path, default=PAGE, help=f"page (default {PAGE})")
    args = parser.parse_args(argv)
    runs, refusals = [], []
    for where in args.runs:
        try:
            runs.append(read_run(where))
        except Refused as refusal:
            refusals.append(str(refusal))
    if not runs:
        raise Refused("\n".join(refusals))
    with failing(args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        said = compare(runs, args.output)
    say(said)
    if refusals:
        raise Failed("\n".join(refusals))


if __name__ == "__main__":
    sys.exit(main())
