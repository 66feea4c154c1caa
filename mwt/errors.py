"""The exceptions that a person is meant to read."""


class InputError(ValueError):
    """Something that the user gave (a file, a key, a value) cannot be used.

    The message is one clear sentence that names the thing and says what to do. Programs print it without a
    traceback and exit with status 2.
    """


class NotDefinedError(InputError):
    """A combination that has no meaning, such as a field on whole pixels with a task that asks for its gradient.

    Nothing is wrong and nothing can be mended. Programs exit with status 3, and tables say "not defined".
    """


class TrainingError(RuntimeError):
    """A run cannot go on (a loss that is not finite, say). The message names the step. Programs exit with status 1."""


class DivergedError(TrainingError):
    """A fit whose loss or weights are no longer finite: a result of its settings. Programs exit with status 4."""
