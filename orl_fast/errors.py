"""User errors: shown by the command line without a traceback, exit code 1."""


class OrlFastError(Exception):
    """Base class. A message says what is wrong, where, what was found, and the remedy."""


class DataError(OrlFastError):
    """Input data is missing, empty, damaged or of the wrong kind."""


class ConfigError(OrlFastError):
    """A recipe or an option has an unknown key or an invalid value."""


class StaleError(OrlFastError):
    """A table or checkpoint was made from inputs that differ from those in use."""


class MissingStageError(OrlFastError):
    """A stage is run before a stage that it depends on."""
