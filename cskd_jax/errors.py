"""The one exception that is shown to the user as a line instead of a traceback."""


class UserError(Exception):
    """Something that the user can mend: bad configuration, bad data, a path that does not fit.

    The message is one line that names what is wrong and what is allowed. `cskd_jax.main` prints it and exits with code 2.
    """
