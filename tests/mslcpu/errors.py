"""The one exception that mslcpu raises."""


class MslError(RuntimeError):
    """A kernel was rejected, or failed while it ran. The message names the kernel's own file and line."""
