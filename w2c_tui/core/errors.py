"""The error tree. Every failure that a user can cause or meet is one of these.

    W2CError
    ├── ConfigError            a setting, flag or environment variable that cannot be used
    ├── ImageError             an image that cannot be found, fetched, decoded or accepted
    ├── PromptError            a conversation that cannot be put before this model
    │   └── ContextOverflowError
    ├── ModelError             a model that cannot be found, read or run
    │   ├── ModelNotFoundError
    │   ├── CheckpointError    a damaged, incomplete or inconsistent checkpoint
    │   ├── UnsafeCheckpointError
    │   └── MissingPackageError
    ├── DownloadError          something that had to come over the network and did not
    ├── EngineError            the engine process or the running model failed
    │   ├── EngineCrashedError
    │   └── OutOfMemoryError
    ├── RenderError            a page that could not be turned into a picture
    │   └── BrowserNotFoundError
    └── StoreError             the session database or a page on disk

Errors of libraries are turned into these at one seam each, with the cause kept (`raise ... from`).
This module knows nothing about who raises or shows them.
"""

from __future__ import annotations


class W2CError(Exception):
    """What failed and on which value (`message`), and what to do about it (`hint`)."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(cls: type[W2CError], message: str, hint: str) -> W2CError:
    return cls(message, hint=hint)


class ConfigError(W2CError): ...


class ImageError(W2CError): ...


class PromptError(W2CError): ...


class ContextOverflowError(PromptError): ...


class ModelError(W2CError): ...


class ModelNotFoundError(ModelError): ...


class CheckpointError(ModelError): ...


class UnsafeCheckpointError(ModelError): ...


class MissingPackageError(ModelError): ...


class DownloadError(W2CError): ...


class EngineError(W2CError): ...


class EngineCrashedError(EngineError): ...


class OutOfMemoryError(EngineError): ...


class RenderError(W2CError): ...


class BrowserNotFoundError(RenderError): ...


class StoreError(W2CError): ...


def error_named(name: str, message: str, hint: str) -> W2CError:
    """The error of class `name`, for errors that crossed a process boundary as plain data."""
    cls = _by_name(W2CError).get(name, W2CError)
    return cls(message, hint=hint)


def _by_name(cls: type[W2CError]) -> dict[str, type[W2CError]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found |= _by_name(child)
    return found
