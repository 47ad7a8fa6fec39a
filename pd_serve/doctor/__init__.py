"""``pd-serve doctor``: what a machine offers for moving KV, what pd-serve would use of it, and what to change.

Checks (:mod:`pd_serve.doctor.checks`) turn what they read into findings, and do so in child processes: a driver
that hangs or crashes is a finding, never the end of the report. Nothing here changes the machine.
"""
