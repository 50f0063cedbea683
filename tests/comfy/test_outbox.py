"""What waits for one socket: bounded, in order; previews give way, ends never do. Pictures in both framings."""

from __future__ import annotations

import struct

from fleet_server.comfy.outbox import Outbox, picture_of
from tests.comfy_node.files import preview, preview_frame, preview_with_metadata_frame


async def drained(box: Outbox, count: int) -> list[str | bytes]:
    return [frame for _ in range(count) for frame in (await box.take()).frames]


async def test_a_later_preview_takes_the_place_of_one_that_waits() -> None:
    box = Outbox(most=10, most_bytes=1000, previews=3)
    box.put("start")
    for n in range(50):
        box.put(b"%d" % n, ("preview", "job"), replace=True)
    box.put(b"other", ("preview", "job 2"), replace=True)
    box.put_end("job", ["success", "null"])
    assert not box.full
    assert await drained(box, 6) == ["start", b"0", b"1", b"49", b"other", "success", "null"]


async def test_texts_give_way_to_later_ones_of_their_kind_only_where_the_socket_is_behind() -> None:
    box = Outbox(most=100, most_bytes=100_000, crowded=3)
    for n in range(3):
        box.put(f"state {n}", ("progress_state", "job"))
    assert await drained(box, 3) == ["state 0", "state 1", "state 2"]
    for n in range(20):
        box.put(f"state {n}", ("progress_state", "job"))
    assert await drained(box, 3) == ["state 0", "state 1", "state 19"] and not box._entries, "in their order"


async def test_a_socket_that_takes_nothing_is_given_up_and_previews_go_first() -> None:
    box = Outbox(most=1000, most_bytes=1000)
    box.put(b"x" * 600, ("preview", "a"), replace=True)
    box.put("y" * 600)
    assert not box.full, "the preview made room"
    assert await drained(box, 1) == ["y" * 600]
    for _ in range(3):
        box.put("z" * 400)
    assert box.full


def test_pictures_with_metadata_become_plain_ones() -> None:
    image = preview(1)
    picture = picture_of(preview_with_metadata_frame(image, "1", "p"))
    assert picture is not None
    assert picture.plain == preview_frame(image) and picture.lossy
    plain = picture_of(preview_frame(image))
    assert plain is not None and plain.plain == preview_frame(image)
    result = picture_of(struct.pack(">II", 1, 2) + b"\x89PNG")
    assert result is not None and not result.lossy, "a PNG is a result (SaveImageWebsocket): it is not dropped"


def test_what_is_no_picture_is_left_alone() -> None:
    assert picture_of(struct.pack(">II", 3, 1) + b"1text") is None
    for broken in (b"", b"\0\0\0\1", struct.pack(">II", 4, 99) + b"{}", struct.pack(">II", 4, 2) + b"[}xx"):
        assert picture_of(broken) is None
