"""The one exception of this room: its text tells a person what was found, what was expected and what to do."""


class ConvertError(Exception):
    """A problem with the source, the destination, the machine or the request."""


class Refused(ConvertError):
    """The finished file did not pass verification; it was not given its name."""
