"""The errors that users can cause and mend. The command line shows them without a traceback and exits with 1."""


class OrlFastError(Exception):
    """Base class. A message says what is wrong, where, what was found, and the remedy."""


class DataError(OrlFastError):
    """Input data is missing, empty, corrupt or of another kind than needed."""


class ConfigError(OrlFastError):
    """A recipe or an option has an unknown key or a value that cannot work."""


class StaleError(OrlFastError):
    """A table or checkpoint was made from other inputs than those in use."""


class MissingStageError(OrlFastError):
    """A stage is run before the stage that it builds on."""
