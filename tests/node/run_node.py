"""``run_node.py BEHAVIOUR prefill|decode [flags]``: the real command line, with the scripted engine."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from pd_serve import cli
from pd_serve.node import main

behaviour = sys.argv.pop(1)
command = [sys.executable, str(Path(__file__).with_name("scripted_engine.py")), behaviour]
main.run = functools.partial(main.run, engine_command=command)
cli.main()
