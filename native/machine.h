// What this machine does at best with an instruction set and so many threads, measured: what benchmarks are held against.
#pragma once
#include "kernels.h"

// Per second, of all threads together. An operation is a multiplication or an addition.
struct Limits {
  double read_bytes, int8_ops, float_ops;
};

// Takes about a second and, while it runs, a buffer of eight times the last cache, at least 256 MiB.
Limits measure_limits(const KernelTable& kernels, int threads);
