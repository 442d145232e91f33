// Measures this machine's peak rates with an instruction set and a number of threads, for comparison in benchmarks.
#pragma once
#include "kernels.h"

// Per second, over all threads together. An operation is a multiplication or an addition.
struct Limits {
  double read_bytes, int8_ops, float_ops;
};

// Takes about a second, and temporarily a buffer of eight times the last-level cache, at least 256 MiB.
// Takes at most `memory` bytes for the buffer that is read, or 64 MiB if that is less.
Limits measure_limits(const KernelTable& kernels, int threads, size_t memory);
