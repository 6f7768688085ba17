"""The problems that the suites time, each in every competitor's way: `make(name, **shape)` of a module gives one competitor.

A module here is used twice: by a suite, in its own process, and by `benchmarks.worker`, in a fresh process per competitor.
"""
