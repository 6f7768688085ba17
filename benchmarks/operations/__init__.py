"""Define the problems that the suites time: `make(name, **arguments)` of a module returns one competitor for its problem.

Two callers use a module: a suite in its own process, and `benchmarks.worker` in a fresh process per competitor.
"""
