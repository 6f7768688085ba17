"""Other libraries' names and files, on this library's code."""
