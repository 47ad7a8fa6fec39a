"""Checks, a module a section. A check is a function of the machine that returns its findings.

``CHECKS`` of each module lists them in the order of the report. They run in a child process, where they may import
and try what they like; they only read and probe, and give back what they take. Where reading and judging can be apart
they are, so that judgement is tested on machines that do not have the thing.
"""
