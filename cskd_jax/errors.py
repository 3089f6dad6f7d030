"""Exceptions that `cskd_jax.main` shows as one line, each with its exit code."""


class UserError(Exception):
    """Something that the user can mend: bad configuration, bad data, a path that does not fit.

    The message is one line that names what is wrong and what is allowed.
    """

    exit_code = 2


class DivergedError(UserError):
    """Training met a value that is not finite."""

    exit_code = 3


class InterruptedRun(UserError):
    """A signal asked the run to stop and its state is saved: the same command resumes it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again
