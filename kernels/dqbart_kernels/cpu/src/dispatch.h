// Instruction sets that this build holds and this processor runs, best first.
#pragma once
#include <vector>

#include "kernels.h"

namespace dq {
std::vector<const Kernels*> usable_kernels();
}
