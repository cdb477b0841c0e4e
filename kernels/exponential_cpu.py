"""e^u, and what sigmoids need of it, as vector instructions for the compiled sweeps."""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from gapprobe.kernels.compiled import bits, exact, from_bits

FAINTEST = np.float32(-87.0)  # a little above the u whose e^u float32 no longer holds with all its digits
_LOG2_E = np.float32(1.4426950408889634)
# log 2 in two: the first has so few digits that a small whole number times it is exact.
_LOG_2, _LOG_2_REST = np.float32(0.693145751953125), np.float32(1.42860682030941723e-6)
_WHOLE = np.float32(1.5 * 2**23)  # added to a number, it leaves no room for a fraction
# e^r = 1 + r + r^2 (c5 + r (c4 + ...)) for |r| <= log(2) / 2 (expf of Moshier's Cephes)
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
# log((1 + s) / (1 - s)) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...)
_ODD = tuple(np.float32(2 / k) for k in (3, 5, 7, 9, 11, 13, 15))


@exact
@no_type_check
def exponential(u):
    """Return e^u for u from `FAINTEST` to 0, less than two units in the last place off."""
    shifted = u * _LOG2_E + _WHOLE
    whole = shifted - _WHOLE
    r = (u - whole * _LOG_2) - whole * _LOG_2_REST
    p = ((((_C0 * r + _C1) * r + _C2) * r + _C3) * r + _C4) * r + _C5
    return from_bits(bits(p * (r * r) + r + np.float32(1)) + (bits(shifted) << np.int32(23)))


@exact
@no_type_check
def log_of_one_and(e):
    """Return log(1 + e) for e from 0 to 1, a small one's to its last digits."""
    s = e / (e + np.float32(2))  # at most 1/3: what is left out of the series is below a rounding
    z = s * s
    p = ((((((_ODD[6] * z + _ODD[5]) * z + _ODD[4]) * z + _ODD[3]) * z + _ODD[2]) * z + _ODD[1]) * z + _ODD[0]) * z
    return s * p + (s + s)
