"""The errors fedkd raises on purpose; everything else is a bug."""

from __future__ import annotations


class FedkdError(Exception):
    """Base class: one line that says what was expected, what was got and what to do."""


class ConfigError(FedkdError):
    """The user's input (config, data, paths) cannot be used; nothing has been written."""


class SchemaError(FedkdError):
    """A message does not have the tensors, shapes or finite values that its receiver expects."""


class QuorumError(FedkdError):
    """Too few clients gave a usable answer for the round to count."""


class Starved(FedkdError):
    """What is left to learn from is too little, again and again: the run would end with a student at chance."""


class PrivacyError(FedkdError):
    """Something would have left a client, or been read, against the privacy mechanism in force."""


class BudgetExhausted(PrivacyError):
    """The next release would pass the privacy budget; it was not made."""
