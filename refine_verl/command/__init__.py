"""What all commands share: `front` has help, exit codes and messages, `keys` the one grammar of options, `show` tables
and progress, `quiet` what other packages are not to say. `commandline` and `jobs` are for the commands that compose a
run with Hydra."""
