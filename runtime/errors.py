"""What ends a command with one line instead of a traceback."""


class UserError(Exception):
    """A mistake of the user's: its text is the one line that says what is wrong and what to do."""


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal has ended the work, with everything saved; the text says how to go on."""

    def __init__(self, text: str, signal_number: int):
        super().__init__(text)
        self.signal_number = signal_number
