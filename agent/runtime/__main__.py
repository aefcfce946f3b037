"""Run the command line: `python -I -S -m …` with nothing on the way that a command does not need."""

from __future__ import annotations

import sys

from caisson.agent.runtime.main import main

sys.exit(main())
