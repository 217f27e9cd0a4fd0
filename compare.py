"""Sets runs side by side: final figures, the settings that differ, curves over each other.

python compare.py first second            logs/first and logs/second (run=first, run=second)
python compare.py logs/a logs/archive/*   folders of logs, wherever they are
"""

import sys
from pathlib import Path

from cnn import cli
from cnn.records.compare_runs import compare, read_run
from cnn.utils.files import failing

PAGE = Path("logs", "compare.html")


def main(argv: list[str] | None = None) -> int:
    return cli.main(prepare, argv, prefix="")


def prepare(argv: list[str]) -> None:
    """Does all of it, since it needs no torch."""
    parser = cli.parser("compare.py", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of logs, or a run's name")
    parser.add_argument("--output", type=Path, default=PAGE, help=f"page (default {PAGE})")
    args = parser.parse_args(argv)
    runs = [read_run(where) for where in args.runs]
    with failing(args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.write(compare(runs, args.output))


if __name__ == "__main__":
    sys.exit(main())
