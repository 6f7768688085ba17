"""The exception that mslcpu raises."""


class MslError(RuntimeError):
    """A kernel was rejected or failed during its run. The message names the kernel's own file and line."""
