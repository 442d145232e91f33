// Chooses the instruction set for this processor.
#pragma once
#include <string>
#include <vector>

#include "../kernels.h"

// The compiled-in instruction sets that this processor supports, best first. "scalar" is always included.
std::vector<const KernelTable*> available_kernels();
// The best one, or the one named; throws std::runtime_error with a list of the available ones if it is not among them.
const KernelTable& choose_kernels(const std::string& isa);
