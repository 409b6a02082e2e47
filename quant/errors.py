"""Errors that a user can meet. Each message says what is wrong, why, and what to do."""


class Dsr1Error(Exception):
    """An error told to the user in a sentence or two, with no traceback; exit status 1."""


class ConfigError(Dsr1Error):
    """config.json is missing a key or asks for something this runtime does not do."""


class CheckpointError(Dsr1Error):
    """A checkpoint's files are damaged, incomplete, or hold tensors that the model does not have."""


class TokenizerError(Dsr1Error):
    """The tokenizer files or the chat template cannot be used."""


class ContextError(Dsr1Error):
    """A prompt or a requested context is longer than the model or the cache allows."""


class DeviceError(Dsr1Error):
    """A device was asked for that this machine or this version does not offer."""


class StoreError(Dsr1Error):
    """A store cannot be written, is not finished, or is not what its manifest says."""


class UsageError(Dsr1Error):
    """Options that contradict each other or cannot be read; exit status 2."""
