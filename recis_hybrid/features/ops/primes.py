"""Prime numbers for hashes."""

from __future__ import annotations

_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(n: int) -> bool:
    """Return whether n, below 2^64, is a prime.

    References:
        The test of Miller and Rabin; these witnesses are sufficient below 3.3e24 (Sorenson and Webster: Strong
        pseudoprimes to twelve prime bases, Math. Comp. 2017).
    """
    if n < 2:
        return False
    for prime in _WITNESSES:
        if n % prime == 0:
            return n == prime
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for witness in _WITNESSES:
        power = pow(witness, odd, n)
        if power in (1, n - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % n
            if power == n - 1:
                break
        else:
            return False
    return True


def largest_prime_up_to(n: int) -> int:
    """Return the largest prime up to n, for n of at least 2.

    Example:
        >>> largest_prime_up_to(29_000)
        28979
    """
    while not is_prime(n):
        n -= 1
    return n
