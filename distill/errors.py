"""The one error a user sees: what was found, what was expected, what to do."""


class DistillError(Exception):
    """Shown as one sentence at the edge; anything else that escapes is a bug."""
