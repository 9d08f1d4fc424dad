"""What the front end and the engine process say to each other, and how it is put on a pipe.

One frame is a four-byte big-endian length and that many bytes of MessagePack. Knows nothing about
processes, threads or models.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, TypeVar

import msgspec

from w2c_tui.backends.base import Event, ModelInfo
from w2c_tui.core.config import DeviceShare, ExportSpec, GenerationParams, LoadSpec
from w2c_tui.core.conversation import Attachment, Hints, Message, TextLine
from w2c_tui.export.outcome import Exported


class Load(msgspec.Struct, frozen=True, tag=True):
    """Load the model of `spec`; `pictures_soon`: and what reads the text on its pictures."""

    request: int
    spec: LoadSpec
    pictures_soon: bool = False


class Stream(msgspec.Struct, frozen=True, tag=True):
    """Answer the conversation; `ahead` and `until` as in `Backend.stream`."""

    request: int
    messages: tuple[Message, ...]
    params: GenerationParams
    ahead: int = 0
    until: str = ""


class Prefill(msgspec.Struct, frozen=True, tag=True):
    """Read the conversation before it is sent, see `Backend.prefill`."""

    request: int
    messages: tuple[Message, ...]
    params: GenerationParams


class ReadText(msgspec.Struct, frozen=True, tag=True):
    request: int
    image: Attachment
    hints: Hints = "text"


class Plan(msgspec.Struct, frozen=True, tag=True):
    """Where would the model of `spec` be put? Nothing is loaded."""

    request: int
    spec: LoadSpec


class Convert(msgspec.Struct, frozen=True, tag=True):
    """Write the model `source` as a standard folder at `out`."""

    request: int
    source: str
    out: str


class Export(msgspec.Struct, frozen=True, tag=True):
    """Write the model `source` as GGUF files into the folder `out`; `name` is their first part."""

    request: int
    source: str
    out: str
    name: str
    force: bool
    spec: ExportSpec


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Ends request `request`, running or waiting; it still gets its last reply."""

    request: int


class Progress(msgspec.Struct, frozen=True, tag=True):
    request: int
    phase: str
    done: int
    total: int


class Emitted(msgspec.Struct, frozen=True, tag=True):
    request: int
    event: Event


class Done(msgspec.Struct, frozen=True, tag=True):
    """The last reply of a request that worked."""

    request: int
    info: ModelInfo | None = None
    lines: tuple[TextLine, ...] | None = None
    shares: tuple[DeviceShare, ...] | None = None
    exported: Exported | None = None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The last reply of a request that failed with the error class `error`."""

    request: int
    error: str
    message: str
    hint: str


Request = Load | Stream | Prefill | ReadText | Plan | Convert | Export | Cancel
Reply = Progress | Emitted | Done | Failed

T = TypeVar("T")
_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()
request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def write_frame(pipe: BinaryIO, message: Request | Reply) -> None:
    """Write one message whole. Raises OSError or ValueError if the other side is gone."""
    data = _encoder.encode(message)
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def read_frame(pipe: BinaryIO, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """The next message; None when the other side is gone."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = pipe.read(length)
    return decoder.decode(data) if len(data) == length else None
