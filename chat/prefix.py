"""What two token sequences have in common at the beginning: all that a KV cache can share."""

from collections.abc import Sequence


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning, by halving: slices compare at C's speed."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
