"""The command line: keys and their ranges, errors, signals, files, subprocesses, the machine."""
