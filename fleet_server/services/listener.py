"""How far a listener has come in the stream of events."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fleet_server.services.mailbox import Happening, Mailbox
from fleet_server.services.texts import Texts

_ID = re.compile(r"[0-9]{1,15}(?:-[0-9]{1,15})?")


def is_event_id(text: str) -> bool:
    """Whether `text` could be the id of a stored event."""
    return _ID.fullmatch(text) is not None


def order(event_id: str) -> tuple[int, int]:
    """Ids of events in their order."""
    milliseconds, _, sequence = event_id.partition("-")
    return int(milliseconds), int(sequence or 0)


class Listener:
    """A mailbox, and how far its listener has come."""

    def __init__(self, box: Mailbox, place: str) -> None:
        self.box = box
        self.place = place
        self.version = 0
        self._texts = Texts() if box.wanted.takes_kind("job_progress") else None

    def rewind(self, since: str) -> None:
        """The listener begins after `since`."""
        self.place = since
        self.box.behind = True

    def pass_by(self, event_id: str) -> None:
        """Nothing up to `event_id` was for the listener."""
        if event_id and is_event_id(self.place) and order(event_id) > order(self.place):
            self.place = event_id

    def news(self, happening: Happening) -> Sequence[Happening]:
        """What of the event is news to the listener: nothing, or the event, with what has to be told before it."""
        if not self.accepts(happening):
            return ()
        return (happening,) if self._texts is None else self._texts.in_order(happening)

    def accepts(self, happening: Happening) -> bool:
        """Whether the event is news: after the listener's place, and newer than the snapshot it began with."""
        if happening.kind == "gap":
            self.place = happening.id
            return True
        if happening.id:
            if is_event_id(self.place) and order(happening.id) <= order(self.place):
                return False
            self.place = happening.id
        return not (happening.version and happening.version <= self.version)
