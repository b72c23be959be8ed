"""The one exception that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, told in one line that names the file or flag and the fix.

    Scripts turn it into `error: <message>` on stderr and exit status 1 (see `utils.cli.run`); anything else that
    escapes is a bug and keeps its traceback.
    """
