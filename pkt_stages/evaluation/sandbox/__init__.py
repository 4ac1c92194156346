"""Running generated code so that it can neither do harm nor forge its verdict (docs/evaluation.md, decisions/012).

pool.py       the door: jobs in, verdicts out, in parallel
worker.py     trusted, beside the sandboxes: gives them samples, keeps the clock
levels.py     what this host can confine, and starting a sandbox
seccomp.py    the system calls that a sample may make
server.py     trusted, the first process inside: forks one per sample
candidate.py  confined: the generated code
checker.py    confined: the tests, beside the generated code or apart from it
plain.py      what these two exchange when they are apart
"""
