"""The command line: a table of the commands, their shared parts, and one module for each command."""
