"""Run a command and write its peak resident memory in MiB to a file: python peak.py FILE COMMAND...

A small process of its own: Linux counts the memory of the process that starts a command into the peak of the command.
"""

import resource
import subprocess
import sys
from pathlib import Path

status = subprocess.run(sys.argv[2:]).returncode
Path(sys.argv[1]).write_text(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024))
sys.exit(status)
