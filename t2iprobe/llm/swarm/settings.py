"""How patient a client is, and what it counts."""

from dataclasses import dataclass, field

__all__ = ["Counters", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How patient a client is, in seconds, and what it keeps.

    stall: silence after which a peer counts as gone (it tells every second that it computes); step: for a
    pass of up to 256 rows on a server, however busy, and so many times as long for more; recover: to find
    others for a failed one; ban: that a failed peer is avoided, doubled each time; ping: to answer one;
    delay: of a simulated round trip. attempts: replacements tried for one failure at most. history_bytes: of
    kept inputs, beside the first block's. link: bytes a second of a simulated link.
    """

    stall_seconds: float = 5.0
    step_seconds: float = 60.0
    recover_seconds: float = 60.0
    ban_seconds: float = 15.0
    ping_seconds: float = 3.0
    delay_seconds: float = 0.0
    attempts: int = 16
    history_bytes: int = 256 << 20
    eight_bits: bool = False
    link: float | None = None


@dataclass
class Counters:
    """What a client did: answers waited for, routes found anew, rows read again, seconds lost, bytes."""

    round_trips: int = 0
    reroutes: int = 0
    replayed_tokens: int = 0
    recovery_seconds: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    failures: list[str] = field(default_factory=list)
