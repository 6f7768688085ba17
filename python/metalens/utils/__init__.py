"""What every package may use: arrays as numbers, files, errors, the progress bar."""
