"""The one error that is meant for the person at the keyboard."""


class VLMoError(ValueError):
    """A mistake in what the user gave (options, files, devices); the message names the remedy.

    `run.py` and the other commands print it without a traceback and exit with 2.
    """
