"""A child process of doctor: runs the checks of one section, one after the other, and emits what each finds.

``python -m pd_serve.doctor.section NAME`` with the settings as JSON on standard input. What a check raises becomes a
finding.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time

import msgspec

from pd_serve import records
from pd_serve.config import DoctorConfig
from pd_serve.doctor.findings import Finding, note
from pd_serve.doctor.machine import Check, Machine


def guarded(check: Check, machine: Machine) -> list[Finding]:
    """What a check finds, or that it could not be done."""
    try:
        return check(machine)
    except Exception as error:
        name = check.__name__.replace("_", " ")
        fix = "please report it, with the output of pd-serve doctor --json"
        return [note(name, f"could not be checked: {type(error).__name__}: {error}", fix)]


def main() -> None:
    records.claim_stdout()
    logging.basicConfig(level=logging.ERROR)
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")  # what does not work here is a finding, not a line among them
    module = importlib.import_module(f"pd_serve.doctor.checks.{sys.argv[1]}")
    machine = Machine(msgspec.json.decode(sys.stdin.buffer.read(), type=DoctorConfig))
    for check in module.CHECKS:
        start_s = time.monotonic()
        found = guarded(check, machine)
        records.emit({"findings": msgspec.to_builtins(found), "seconds": time.monotonic() - start_s})
    # what the self-test has to know of them
    records.emit({"facts": getattr(module, "facts", dict)()})


if __name__ == "__main__":
    main()
