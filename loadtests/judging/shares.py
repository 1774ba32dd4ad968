"""What a share seen in a sample says of the true one: exact binomial tails."""

import math


def shows_less(seen: int, of: int, share: float, confidence: float) -> bool:
    """True where so few *seen* show that the true share is below *share*."""
    return of > 0 and _at_most(seen, of, share) <= 1 - confidence


def shows_more(seen: int, of: int, share: float, confidence: float) -> bool:
    """True where so many *seen* show that the true share is above *share*."""
    return seen > 0 and 1 - _at_most(seen - 1, of, share) <= 1 - confidence


def needed(share: float, confidence: float) -> int:
    """The fewest that show less than *share*, if none of them is seen: the rule of three, exactly."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-share))


def _at_most(seen: int, of: int, share: float) -> float:
    """The probability of at most *seen* of *of*, each with probability *share*."""
    if seen >= of:
        return 1.0
    odds = math.log(share) - math.log1p(-share)
    # Summed from the largest term down: the terms fall off fast on the way to 0.
    log_term = (
        math.lgamma(of + 1)
        - math.lgamma(seen + 1)
        - math.lgamma(of - seen + 1)
        + seen * math.log(share)
        + (of - seen) * math.log1p(-share)
    )
    if seen > of * share:
        return 1 - _at_most_complement(seen, of, log_term, odds)
    total = 0.0
    for count in range(seen, -1, -1):
        term = math.exp(log_term)
        total += term
        if term < total * 1e-12:
            break
        if count:
            log_term += math.log(count) - math.log(of - count + 1) - odds
    return min(1.0, total)


def _at_most_complement(seen: int, of: int, log_term: float, odds: float) -> float:
    """The probability of more than *seen*, where that is above the mean: the terms fall off upwards."""
    total = 0.0
    for count in range(seen + 1, of + 1):
        log_term += math.log(of - count + 1) - math.log(count) + odds
        term = math.exp(log_term)
        total += term
        if term < total * 1e-12:
            break
    return total
