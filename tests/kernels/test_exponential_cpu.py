"""What the sweeps make of e^u and log(1 + e), against float64: within so many of float32's last places."""

import numba
import numpy as np

from gapprobe.kernels import exponential_cpu

# jaxtyping, which these tests run under, must not see what numba compiles.
exponential, log_of_one_and = exponential_cpu.exponential, exponential_cpu.log_of_one_and


@numba.njit
def each_exponential(u, out):
    for i in range(len(u)):
        out[i] = exponential(u[i])


@numba.njit
def each_log(e, out):
    for i in range(len(e)):
        out[i] = log_of_one_and(e[i])


def places_off(found, true):
    return (np.abs(found - true) / np.spacing(true.astype(np.float32))).max()


def test_the_exponential_is_as_good_as_float32_holds():
    u = np.concatenate([-np.geomspace(1e-30, 87.0, 200_000), [0.0, -87.0]]).astype(np.float32)
    found = np.empty_like(u)
    each_exponential(u, found)
    assert places_off(found, np.exp(u.astype(np.float64))) < 2


def test_the_logarithm_is_as_good_as_float32_holds():
    e = np.concatenate([np.geomspace(1e-37, 1.0, 200_000), [0.0, 1.0]]).astype(np.float32)
    found = np.empty_like(e)
    each_log(e, found)
    assert places_off(found, np.log1p(e.astype(np.float64))) < 2
