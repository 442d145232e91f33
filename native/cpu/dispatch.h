// Which instruction set runs here.
#pragma once
#include <string>
#include <vector>

#include "../kernels.h"

// Those compiled in that this processor has, best first. "scalar" is always there.
std::vector<const KernelTable*> available_kernels();
// The best, or the one named; throws std::runtime_error listing the available ones when it is not among them.
const KernelTable& choose_kernels(const std::string& isa);
