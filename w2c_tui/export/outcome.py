"""What an export tells its caller, as plain data. Knows nothing about how any of it is made."""

from __future__ import annotations

import msgspec


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """How the files compare with their checkpoint, on one prompt.

    `subject`: what was compared, in words. Over `num_positions` next-token distributions:
    `max_logit_error`, the mean Kullback-Leibler divergence `kl` in nats, which may be up to
    `kl_limit`, and at how many places the likeliest token is the same. `feature_error`: relative
    error of the image features, which may be up to `feature_limit`; None without a vision tower.
    """

    subject: str
    num_positions: int
    max_logit_error: float
    kl: float
    kl_limit: float
    num_agreeing: int
    feature_error: float | None = None
    feature_limit: float = 0.0


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """The files that were written, and what their user should know about them.

    `mmproj`: the file of the vision tower; empty for models that read text only. `verification`:
    None where it was not asked for.
    """

    model: str
    mmproj: str = ""
    notes: tuple[str, ...] = ()
    verification: Verification | None = None
