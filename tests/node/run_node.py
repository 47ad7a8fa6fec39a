"""``python -m tests.node.run_node BEHAVIOUR prefill|decode [flags]``: the command line, with the scripted engine."""

from __future__ import annotations

import functools
import sys

from pd_serve import cli
from pd_serve.node import main

behaviour = sys.argv.pop(1)
command = [sys.executable, "-m", "tests.node.scripted_engine", behaviour]
main.run = functools.partial(main.run, engine_command=command)
cli.main()
