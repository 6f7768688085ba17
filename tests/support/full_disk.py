"""A disk that is full, without one: files of this process may not grow beyond a size."""

import contextlib
import resource


@contextlib.contextmanager
def largest_file(size):
    """Let every write beyond `size` bytes of a file fail, as on a full disk (EFBIG in place of ENOSPC; Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
