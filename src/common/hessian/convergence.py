"""What an iteration raises that did not arrive."""


class ConvergenceError(ArithmeticError):
    """An iteration ended before it reached its tolerance; the message says how far from it."""
