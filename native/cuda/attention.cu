// The attention ops and which kernel serves which shapes.
#include "attention.cuh"

namespace cuda {
namespace attention {
void paged_write(const Operands& o, Launch& launch);
void rope_write(const Operands& o, Launch& launch);
void whole(const Operands& o, Launch& launch);

constexpr int FEW = 16, ALL = 1 << 20;

// A step may hold sequences of one row and of many: each kernel skips the others'.
static void paged_attention(const Operands& o, Launch& launch) {
  const Tensor &q = o.in(0), &keys = o.in(1);
  if (!decodes(keys)) return general(o, launch);
  const bool both = q.most[0] > FEW && prompts(keys, launch);
  decode(o, both ? FEW : ALL, launch);
  if (both) prompt(o, FEW, launch);
}

}  // namespace attention

const Entry ATTENTION[] = {
    {"pagedWrite", attention::paged_write},
    {"ropeWrite", attention::rope_write},
    {"pagedAttention", attention::paged_attention},
    {"attention", attention::whole},
    {nullptr, nullptr},
};

}  // namespace cuda
