"""Running generated code so that it can neither do harm nor forge its verdict.

pool.py       the door: jobs in, verdicts out, in parallel
levels.py     what this host can confine, and how
worker.py     trusted: carries messages between the two confined processes below, keeps the clock
candidate.py  confined: the generated code
checker.py    confined: the tests, calling the candidate through proxies
plain.py      the plain data that may pass between them
"""
