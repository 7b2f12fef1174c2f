"""The errors that a job turns into exit codes: what the user can mend, and what the storage refused."""


class InputError(ValueError):
    """The user's input is wrong; one line names the file or field and what is allowed. A job exits 2."""


class StorageError(OSError):
    """The storage refused to read or write in the middle of the work (disk full, gone); a job exits 1.

    The message is one line that names the location and the reason.
    """


class UnusableStorageError(StorageError, InputError):
    """The storage named by the user cannot be written, found out before the work began; a job exits 2."""
