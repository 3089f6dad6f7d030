"""What is typed: the parts that the commands share, and one thin module a command."""
