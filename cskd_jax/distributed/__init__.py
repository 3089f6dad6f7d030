"""Devices and processes, signals, and the processes that a command starts and watches."""
