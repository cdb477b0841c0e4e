"""Values that break programs."""

from tests.soak.case import Pick

BIG = (2**31 - 1, 2**31, 2**32, 2**40, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 10**9, 10**9 + 1, 10**18, 10**40)
NUMBERS = (0, 1, 2, 3, 7, 8, 255, 256, -1, -8, *BIG, 10**4299)
TEXTS = (
    "",
    "row 0",
    "row 3",
    "../../outside/victim.txt",
    "/etc/passwd",
    "a\nb",
    "\x1b[2J",
    "\x00",
    "\ud800",
    "é" * 300,
)
ODD = (None, True, False, 1.5, 1e308, [], {}, [1], [[]], {"a": 1}, [None], "1")
CODES = ("F64", "F32", "BF16", "F16", "I64", "I32", "U64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", "bf16")


def odd(pick: Pick) -> object:
    """Return a value that has no business where it will stand."""
    kind = pick.randint(0, 3)
    return pick.choice((NUMBERS, TEXTS, ODD, (pick.randint(-(2**65), 2**65),))[kind])
