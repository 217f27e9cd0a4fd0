"""Sets runs side by side: final figures, the settings that differ, curves over each other.

python compare.py first second            logs/first and logs/second (run=first, run=second)
python compare.py logs/a logs/archive/*   folders of logs, wherever they are
"""

import sys

from cnn import comparing

if __name__ == "__main__":
    sys.exit(comparing.main(sys.argv[1:], __doc__))
