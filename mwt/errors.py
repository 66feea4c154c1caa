"""The exceptions that a person is meant to read."""


class InputError(ValueError):
    """Something that the user gave (a file, a key, a value) cannot be used.

    The message is one clear sentence that names the thing and says what to do. Programs print it without a
    traceback and exit with status 2.
    """


class TrainingError(RuntimeError):
    """A run cannot go on (a loss that is not finite, say). The message names the step. Programs exit with status 1."""
