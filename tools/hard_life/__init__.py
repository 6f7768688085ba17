"""What happens to metalens's files when a process is killed, a disk is full, a bit flips, or two processes write to one place."""
