"""What is typed: the parts that the commands share, the list of the commands, and one module for a command."""
