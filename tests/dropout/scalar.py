"""The mask word by word in Python integers, as the paper writes its generator."""

MASK32 = 0xFFFFFFFF


def philox(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """The four words that rounds of Philox-4x32 make of a counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return [c0, c1, c2, c3]


def keep(seed: int, row: int, col: int, p: float) -> bool:
    """Whether the element is kept."""
    counter = [col // 8, row >> 32, row & MASK32, 0]
    out = philox(counter, [seed & MASK32, (seed >> 32) & MASK32], 7)
    half = out[col % 8 // 2] >> (16 * (col % 2)) & 0xFFFF
    return (half ^ 0x8000) >= min(round(p * 65536), 65535)  # signed order of 16 bits
