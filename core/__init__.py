"""The machinery behind the scripts: importing a module here defines things and does nothing else."""
