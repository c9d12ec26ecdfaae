"""Errors of the images: a source that cannot be used, and what stops a run that has begun."""

from __future__ import annotations

from njepa.config import ConfigError


class SourceError(ConfigError):
    """A source that holds nothing to train on; the message says what was found and expected."""


class DataError(RuntimeError):
    """The loader cannot go on; the message names the image or the source and the way out."""


class DecodeError(DataError):
    """These bytes are not a complete image, or nothing can take the place of an unreadable one."""


class LoaderStalled(DataError):
    """No batch came for so long that none will."""
