"""The key of a sample whose place in a shard is known, for messages."""

from __future__ import annotations

from collections.abc import Callable

from ddpm_dist.data.tar_stream import BLOCK, BrokenTar, Tape, members, split_name, ustar_name

MAX_READ = 1 << 26  # bytes between two samples; more lie there only where many were left out of the index


def key_at(read: Callable[[int, int], bytes], start: int, offset: int) -> str:
    """The webdataset key of the image at byte ``offset``, "" where it cannot be told.

    Long names, and with pax all that are not ASCII, stand in records before the header that belongs to the image, and nothing says how
    far before. So the tar is read forward from a place where a header is known to begin. In a damaged shard that may not lead to the
    image; then the short name in the header right before it has to do.

    Args:
        read: returns so many bytes from a position on (size, position); fewer where the file ends.
        start: where a member begins, at or before the image's own: behind the sample before it, or 0.
    """
    at = start

    def forward(size: int) -> bytes:
        nonlocal at
        data = read(min(size, offset - at), at)
        at += len(data)
        return data

    if 0 <= offset - start <= MAX_READ:
        try:
            for member in members(Tape(forward)):
                if start + member.offset == offset:
                    return split_name(member.name)[0]
        except BrokenTar:
            pass
    header = read(BLOCK, max(0, offset - BLOCK))
    return split_name(ustar_name(header))[0] if len(header) == BLOCK else ""
